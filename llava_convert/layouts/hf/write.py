"""Write the transformers layout: config, processor, LLaVA's tokens, and the weights in their classic names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.assets.processor import processor_class, processor_config, tile_processors
from llava_convert.assets.tokenizer.llava_tokens import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    TokenPlan,
    plain_files,
    plan_llava_tokens,
    undo_record,
    with_tokens,
)
from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.layouts import single_part as single
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import output_dtype, shard_limit
from llava_convert.layouts.hf.alone import DIALECTS, NAME, ONEVISION
from llava_convert.layouts.naming import outputs
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION, Checkpoint
from llava_convert.model.configs import family, ordered
from llava_convert.model.facts import dialect_for, words_of
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target
from llava_convert.ops.rows import PadRows

# transformers' class of each model type.
_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    ONEVISION: "LlavaOnevisionForConditionalGeneration",
}


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    if part == PROJECTOR:
        return Needs((PROJECTOR,))
    if part != ALL:
        return single.needs(part)
    return Needs(PARTS, (LLM, VISION))


def lower(model: Model, options: TargetOptions) -> Target:
    """The files of the transformers layout."""
    if options.part in (LLM, VISION):
        return single.lower(model, options, NAME)
    dtype = output_dtype(model, options)
    if options.part == PROJECTOR:
        return Target(NAME, (FileSet(outputs(model.part(PROJECTOR), layout_table(NAME), dtype)),), {})
    made = Artefacts(model, options)
    family(LLM, model.configs[LLM])
    kind = kind_of(model)
    tokens, files, record = _tokens(model, made, kind)
    recipes = dict(model.recipes)
    for name in (model.embedding, model.head):
        if tokens.rows_out > recipes[name].shape[0]:
            recipes[name] = recipes[name].then(PadRows(tokens.rows_out))
    rows = recipes[model.embedding].shape[0]
    skip = frozenset({model.head}) if model.tied else frozenset()
    tensors = outputs(recipes, layout_table(NAME), dtype, skip=skip)
    files["config.json"] = to_json(_config(model, made, dtype, rows, tokens, kind))
    files |= made.generation_file()
    files |= {name: to_json(content) for name, content in _processor(model, made, kind).items()}
    added = _added(model, recipes, tokens, record)
    return Target(
        NAME,
        (FileSet(tensors, limit=shard_limit(model, options, NAME)),),
        files,
        added_rows=added,
        notes=made.notes(LLM, VISION),
        warnings=made.warnings(LLM, VISION),
    )


def kind_of(model: Model) -> str:
    """transformers' model type for a model: the first of its LLaVAs that computes it."""
    dialect = dialect_for(NAME, model.facts)
    return next(kind for kind, name in DIALECTS.items() if name == dialect)


def _processor(model: Model, made: Artefacts, kind: str) -> dict[str, dict[str, Any]]:
    """The files of the processor. Raises UsageError for --image-processor where the class leaves no choice."""
    tower, settings = model.configs[VISION], model.checkpoint.settings
    preprocessor = made.preprocessor_config(for_hf=True)
    assert preprocessor is not None  # the tower is known
    if kind == "llava":
        files = {"preprocessor_config.json": preprocessor}
    else:
        if made.options.image_processor == "llava":
            raise UsageError(
                f"--image-processor llava does not apply: {_CLASSES[kind]} cuts pictures into tiles",
                hint="leave it out",
            )
        pairs = words_of(DIALECTS[kind], model.facts)["image_grid_pinpoints"]
        files = tile_processors(preprocessor, tower, kind, pairs)
    files["processor_config.json"] = processor_config(
        tower, settings.select_strategy, IMAGE_TOKEN, kind=kind, aspect=settings.image_aspect_ratio
    )
    return files


def _tokens(model: Model, made: Artefacts, kind: str) -> tuple[TokenPlan, dict[str, bytes], dict[str, Any]]:
    """LLaVA's tokens, the tokenizer's files with them, and what undoes the change."""
    tokenizer = made.required_tokenizer()
    wanted = (IMAGE_TOKEN, VIDEO_TOKEN) if kind == ONEVISION else (IMAGE_TOKEN,)
    plan = plan_llava_tokens(tokenizer, model.recipes[model.embedding].shape[0], wanted)
    templates = made.templates
    files = with_tokens(
        tokenizer,
        plan,
        chat_template=templates.tokenizer,
        processor_template=templates.processor,
        processor=processor_class(kind),
    )
    return plan, files, undo_record(plain_files(tokenizer, templates.tokenizer), plan, files)


def _added(model: Model, recipes: Mapping[str, Recipe], tokens: TokenPlan, record: Mapping[str, Any]) -> dict[str, Any]:
    """What conversion.json keeps of the added rows and tokens, so that the way back can take them off."""
    before = model.recipes[model.embedding].shape[0]
    return {
        "rows": {"from": before, "to": recipes[model.embedding].shape[0]},
        "tokens": [token.record() for token in tokens.added],
        "tokenizer": dict(record),
        "fill": "mean of the old rows",
    }


def _config(model: Model, made: Artefacts, dtype: str, rows: int, tokens: TokenPlan, kind: str) -> dict[str, Any]:
    text = made.text_config(TORCH_NAMES[dtype], rows=rows)
    vision = made.vision_config(TORCH_NAMES[dtype])
    text["architectures"] = [family(LLM, text).kind]
    vision["architectures"] = [family(VISION, vision).kind]
    settings = model.checkpoint.settings
    # The class token is one of the positions; "default" leaves the first feature out, whatever it is.
    positions = family(VISION, model.configs[VISION]).symbol("positions", model.configs[VISION])
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "ignore_index": -100,
        "image_seq_length": positions - (settings.select_strategy == "default"),
        "image_token_index": tokens.image_id,
        "text_config": ordered(text),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "torch_dtype": TORCH_NAMES[dtype],
        "vision_config": ordered(vision),
        "pad_token_id": tokens.pad_id,
        "vocab_size": rows,
        **words_of(DIALECTS[kind], model.facts),
    }
    if kind == ONEVISION:
        del config["image_seq_length"]
        config["video_token_index"] = tokens.ids[VIDEO_TOKEN]
    return ordered(config)
