"""transformers' LlavaForConditionalGeneration: every dialect of its names is read, the classic one written.

The JSON is in the old flavour, which loads from 4.37 to 5.x. `<image>` and `<pad>` become tokens with the ids that
xtuner's own converter gives, and the embedding gets rows for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.hf.alone import NAME, open_part, part_of
from llava_convert.layouts.hf.mlx import from_mlx
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.configs import old_flavour
from llava_convert.model.facts import ASPECT, read_facts
from llava_convert.model.record import read_record
from llava_convert.model.tables.facts import CONFIG, stated_in, unknown_keys
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.tables.names import layout_table
from llava_convert.model.tables.types import read_config
from llava_convert.storage.weights import open_weights

_HALVES = ("text_config", "vision_config")
# What transformers' own LlavaConfig falls back on when a config says nothing of the tower.
_CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def detect(found: Found) -> str | None:
    config = found.config
    if config is None or (
        "text_config" not in config and "LlavaForConditionalGeneration" not in str(config.get("architectures"))
    ):
        return None
    kind = str(config.get("model_type"))
    return f"its config.json is that of a transformers {kind}" if kind.startswith("llava") else None


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open a folder. Raises UnsupportedError for LLaVA-NeXT and its kin, and for names of no dialect."""
    path, beside = found.path, found.beside
    raw = read_config(beside, CONFIG) if beside.has(CONFIG) else {}
    part = part_of(found)
    if part is not None:
        return open_part(found, part)
    if raw.get("model_type") != "llava":
        raise UnsupportedError(f"{path}: {raw.get('model_type')} is not supported, only llava")
    config = old_flavour(raw)
    weights = open_weights(found.weights, headers=found.headers)
    tensors, notes = from_mlx(weights, config, found.headers)
    text, vision = _text_config(config), _vision_config(config)
    # A family that is not known is refused where its tensors are needed, so that `inspect` can tell of the rest.
    known = known_architecture(LLM, text["model_type"])
    sorted_ = sort_tensors(tensors, layout_table(NAME, known.name if known else None), path)
    configs: dict[str, dict[str, Any] | None] = {LLM: text, VISION: vision, PROJECTOR: None}
    parts = {name: Part(sorted_.weights[name], None, None, configs[name], found.beside) for name in PARTS}
    layer = config.get("vision_feature_layer")
    if isinstance(layer, list):
        raise UnsupportedError(f"{path}: vision_feature_layer {layer!r}: only one layer can be carried over")
    record = read_record(found.beside)
    recorded = Settings.recorded(record).facts
    said = {ASPECT: recorded[ASPECT], **read_facts(NAME, config, str(path / CONFIG))}
    return Checkpoint(
        layout=NAME,
        path=path,
        root=found.root,
        files=weights.files,
        beside=found.beside,
        parts=parts,
        settings=Settings.of(said),
        image_newline=sorted_.image_newline,
        dropped=sorted_.dropped,
        notes=(*weights.notes, *notes, *(f"names are in the {d} dialect" for d in sorted_.dialects if d != "classic")),
        warnings=weights.warnings,
        stubs=weights.stubs,
        as_written=weights.plain and not notes and sorted_.dialects == ("classic",),
        record=record,
        unknown_keys={key: config[key] for key in unknown_keys(config, (NAME, "common"), (*stated_in(NAME), *_HALVES))},
    )


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config") or {"model_type": "llama"}
    if not isinstance(text, dict):
        raise InputError(f"config.json: text_config should be an object, found {str(text)[:60]!r}")
    text = old_flavour(text)
    text.setdefault("model_type", "llama")
    if "vocab_size" not in text and "vocab_size" in config:
        text["vocab_size"] = config["vocab_size"]
    text.setdefault("torch_dtype", config.get("torch_dtype"))
    if "tie_word_embeddings" not in text and config.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def _vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return dict(_CLIP_L_336)
    return {"model_type": "clip_vision_model", **old_flavour(vision)}
