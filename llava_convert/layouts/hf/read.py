"""transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision: every dialect of names is read, the classic one written.

The JSON is in the old flavour, which loads from 4.37 to 5.x. `<image>` and `<pad>` become tokens with the ids that
xtuner's own converter gives, and the embedding gets rows for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.text import listed, printable
from llava_convert.layouts.adapter_folder import is_adapter
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.hf.alone import DIALECTS, NAME, ONEVISION, open_part, part_of
from llava_convert.layouts.hf.forks import as_llava, forks
from llava_convert.layouts.hf.mlx import from_mlx
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.configs import old_flavour
from llava_convert.model.facts import ASPECT, read_facts
from llava_convert.model.record import read_record
from llava_convert.model.tables.facts import CONFIG, stated_in, unknown_keys
from llava_convert.model.tables.families import architecture_for, known_architecture
from llava_convert.model.tables.names import layout_table
from llava_convert.model.tables.types import read_config
from llava_convert.storage.weights import open_weights

NAMED = "llava"  # the model type of LlavaForConditionalGeneration
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
# And LlavaOnevisionConfig.
_SIGLIP_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def detect(found: Found) -> str | None:
    config = found.config
    if is_adapter(found.names) and not any(name.startswith(("model", "pytorch_model")) for name in found.names):
        return None  # some trainers put the base's config beside an adapter
    if config is None or (
        "text_config" not in config and "LlavaForConditionalGeneration" not in str(config.get("architectures"))
    ):
        return None
    kind = config.get("model_type")
    return f"its config.json is that of a {_called(kind)}" if kind in DIALECTS or kind in forks() else None


def _called(kind: Any) -> str:
    return f"transformers {kind}" if kind in DIALECTS else f"{kind}, a {NAMED} by other names"


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open a folder. Raises UnsupportedError for other models than DIALECTS has, and for names of no dialect."""
    path, beside = found.path, found.beside
    raw = read_config(beside, CONFIG) if beside.has(CONFIG) else {}
    part = part_of(found)
    if part is not None:
        return open_part(found, part)
    config = old_flavour(as_llava(raw, NAMED))
    kind = config.get("model_type")
    if kind not in DIALECTS:
        raise UnsupportedError(f"{path}: {printable(kind)} is not supported, only {listed(list(DIALECTS))}")
    dialect = DIALECTS[kind]
    weights = open_weights(found.weights, headers=found.headers)
    tensors, notes = from_mlx(weights, found.headers)
    text, vision = _text_config(config, kind), _vision_config(config, kind)
    architecture_for(VISION, vision["model_type"])  # the names of another tower's tensors would say less than its own
    # A family that is not known is refused where its tensors are needed, so that `inspect` can tell of the rest.
    known = known_architecture(LLM, text["model_type"])
    sorted_ = sort_tensors(tensors, layout_table(NAME, known.name if known else None), path)
    configs: dict[str, dict[str, Any] | None] = {LLM: text, VISION: vision, PROJECTOR: None}
    parts = {name: Part(sorted_.weights[name], None, None, configs[name], found.beside) for name in PARTS}
    layer = config.get("vision_feature_layer")
    if isinstance(layer, list):
        raise UnsupportedError(f"{path}: vision_feature_layer {layer!r}: only one layer can be converted")
    record = read_record(found.beside)
    recorded = Settings.recorded(record).facts
    cut = config.pop("image_aspect_ratio", None) if raw.get("model_type") in forks() else None
    said = {ASPECT: cut or recorded[ASPECT], **read_facts(dialect, config, str(path / CONFIG))}
    return Checkpoint(
        layout=NAME,
        extra=sorted_.extra,
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
        as_written=weights.plain and not notes and sorted_.dialects == ("classic",) and raw.get("model_type") == kind,
        record=record,
        unknown_keys={
            key: config[key] for key in unknown_keys(config, (NAME, "common"), (*stated_in(dialect), *_HALVES))
        },
    )


def _text_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    usual = "qwen2" if kind == ONEVISION else "llama"
    text = config.get("text_config") or {"model_type": usual}
    if not isinstance(text, dict):
        raise InputError(f"config.json: text_config should be an object, found {str(text)[:60]!r}")
    text = old_flavour(text)
    text.setdefault("model_type", usual)
    if "vocab_size" not in text and "vocab_size" in config:
        text["vocab_size"] = config["vocab_size"]
    text.setdefault("torch_dtype", config.get("torch_dtype"))
    if "tie_word_embeddings" not in text and config.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def _vision_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    vision, usual = config.get("vision_config"), _SIGLIP_384 if kind == ONEVISION else _CLIP_L_336
    if not isinstance(vision, dict):
        return dict(usual)
    return {"model_type": usual["model_type"], **old_flavour(vision)}
