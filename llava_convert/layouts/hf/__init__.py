"""transformers' LlavaForConditionalGeneration: every dialect of its names is read, the classic one written.

The JSON is in the old flavour, which loads from 4.37 to 5.x. `<image>` and `<pad>` become tokens with the ids that
xtuner's own converter gives, and the embedding gets rows for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.assets.processor import processor_config
from llava_convert.assets.tokenizer.llava_tokens import (
    TokenPlan,
    plain_files,
    plan_llava_tokens,
    undo_record,
    with_tokens,
)
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.layouts import single_part as single
from llava_convert.layouts.base import Found, Needs, OpenOptions
from llava_convert.layouts.defaults import output_dtype, shard_limit
from llava_convert.layouts.naming import outputs, sort_tensors
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.configs import family, old_flavour, ordered
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import EMBEDDING, HEAD, Model, Recipe
from llava_convert.model.record import read_record
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target
from llava_convert.ops.ops import PadRows
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.weights import open_weights

NAME = "hf"
IMAGE_TOKEN = "<image>"
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


def open(path: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder. Raises UnsupportedError for LLaVA-NeXT and its kin, and for names of no dialect."""
    beside = folder_sidecars(path)
    raw = beside.read_object("config.json")
    if raw.get("model_type") != "llava":
        raise UnsupportedError(f"{path}: {raw.get('model_type')} is not supported, only llava")
    config = old_flavour(raw)
    found = open_weights(path)
    sorted_ = sort_tensors(found.tensors, layout_table(NAME), path)
    text, vision = _text_config(config), _vision_config(config)
    configs: dict[str, dict[str, Any] | None] = {LLM: text, VISION: vision, PROJECTOR: None}
    parts = {name: Part(sorted_.weights[name], None, None, configs[name], beside) for name in PARTS}
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, list):
        raise UnsupportedError(f"{path}: vision_feature_layer {layer!r}: only one layer can be carried over")
    record = read_record(path)
    return Checkpoint(
        layout=NAME,
        path=path,
        root=path,
        files=found.files,
        parts=parts,
        settings=Settings(
            select_layer=layer,
            select_strategy=config.get("vision_feature_select_strategy", "default"),
            image_aspect_ratio=Settings.recorded(record).image_aspect_ratio,
        ),
        image_newline=sorted_.image_newline,
        dropped=sorted_.dropped,
        notes=tuple(f"names are in the {d} dialect" for d in sorted_.dialects if d != "classic"),
        warnings=found.warnings,
        record=record,
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


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    if part == PROJECTOR:
        return Needs((PROJECTOR,))
    if part != ALL:
        return single.needs(part)
    return Needs(PARTS, (LLM, VISION))


def lower(model: Model, options: TargetOptions) -> Target:
    """The files of the transformers layout. Raises UnsupportedError (exit 4) for what its class cannot express."""
    if options.part in (LLM, VISION):
        return single.lower(model, options, NAME)
    sizes = projector_config({name: recipe.tensor for name, recipe in model.part(PROJECTOR).items()})
    if sizes["depth"] != 2:
        raise UnsupportedError(
            f"the projector has {sizes['depth']} linear layers; transformers' LLaVA has exactly 2",
            hint="convert to official or xtuner instead",
        )
    dtype = output_dtype(model, options)
    if options.part == PROJECTOR:
        return Target(NAME, (FileSet(outputs(model.part(PROJECTOR), layout_table(NAME), dtype)),), {})
    made = Artefacts(model, options)
    family(LLM, model.configs[LLM])
    tokens, files, record = _tokens(model, made)
    recipes = dict(model.recipes)
    for name in (EMBEDDING, HEAD):
        if tokens.rows_out > recipes[name].shape[0]:
            recipes[name] = recipes[name].then(PadRows(tokens.rows_out))
    rows = recipes[EMBEDDING].shape[0]
    skip = frozenset({HEAD}) if model.tied else frozenset()
    tensors = outputs(recipes, layout_table(NAME), dtype, skip=skip)
    files["config.json"] = to_json(_config(model, made, dtype, rows, tokens))
    files |= made.generation_file()
    preprocessor = made.preprocessor_config(for_hf=True)
    if preprocessor is not None:
        files["preprocessor_config.json"] = to_json(preprocessor)
    strategy = model.checkpoint.settings.select_strategy
    files["processor_config.json"] = to_json(processor_config(model.configs[VISION], strategy, IMAGE_TOKEN))
    added = _added(model, recipes, tokens, record)
    return Target(
        NAME,
        (FileSet(tensors, limit=shard_limit(model, options, trained="5GB")),),
        files,
        added_rows=added,
        warnings=made.warnings(LLM, VISION),
    )


def _tokens(model: Model, made: Artefacts) -> tuple[TokenPlan, dict[str, bytes], dict[str, Any]]:
    """LLaVA's tokens, the tokenizer's files with them, and what undoes the change."""
    tokenizer = made.required_tokenizer()
    plan = plan_llava_tokens(tokenizer, model.recipes[EMBEDDING].shape[0])
    templates = made.templates
    files = with_tokens(tokenizer, plan, chat_template=templates.tokenizer, processor_template=templates.processor)
    return plan, files, undo_record(plain_files(tokenizer, templates.tokenizer), plan, files)


def _added(model: Model, recipes: Mapping[str, Recipe], tokens: TokenPlan, record: Mapping[str, Any]) -> dict[str, Any]:
    """What conversion.json keeps of the added rows and tokens, so that the way back can take them off."""
    before = model.recipes[EMBEDDING].shape[0]
    return {
        "rows": {"from": before, "to": recipes[EMBEDDING].shape[0]},
        "tokens": [token.record() for token in tokens.added],
        "tokenizer": dict(record),
        "fill": "mean of the old rows",
    }


def _config(model: Model, made: Artefacts, dtype: str, rows: int, tokens: TokenPlan) -> dict[str, Any]:
    text = made.text_config(TORCH_NAMES[dtype], rows=rows)
    vision = made.vision_config(TORCH_NAMES[dtype])
    text["architectures"] = [single.class_of(text)]
    vision["architectures"] = [single.class_of(vision)]
    settings = model.checkpoint.settings
    # The class token is one of the positions; "default" leaves the first feature out, whatever it is.
    positions = family(VISION, model.configs[VISION]).symbol("positions", model.configs[VISION])
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": positions - (settings.select_strategy == "default"),
        "image_token_index": tokens.image_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": ordered(text),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "torch_dtype": TORCH_NAMES[dtype],
        "vision_config": ordered(vision),
        "vision_feature_layer": settings.select_layer,
        "vision_feature_select_strategy": settings.select_strategy,
        "pad_token_id": tokens.pad_id,
        "vocab_size": rows,
    }
    return ordered(config)
