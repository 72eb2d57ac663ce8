"""One part on its own, as its own class reads it: a text model, or a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import output_dtype, shard_limit
from llava_convert.layouts.naming import outputs
from llava_convert.model.checkpoint import LLM, VISION
from llava_convert.model.configs import family, ordered
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target


def needs(part: str) -> Needs:
    return Needs((part,), (part,))


def lower(model: Model, options: TargetOptions, layout: str) -> Target:
    """A folder for one part, whatever the layout: both official LLaVA and transformers read it."""
    made = Artefacts(model, options)
    dtype = output_dtype(model, options)
    if options.part == LLM:
        return Target(
            layout,
            (llm_files(model, options, dtype, layout),),
            llm_artefacts(model, made, dtype),
            notes=made.notes(LLM),
            warnings=made.warnings(LLM),
        )
    return Target(
        layout,
        (vision_files(model, options, dtype, layout),),
        vision_artefacts(model, made, dtype),
        notes=made.notes(VISION),
    )


def llm_files(model: Model, options: TargetOptions, dtype: str, layout: str) -> FileSet:
    tensors = outputs(model.part(LLM), layout_table("parts"), dtype, prefix="llm/")
    return FileSet(tensors, limit=shard_limit(model, options, layout))


def llm_artefacts(
    model: Model, made: Artefacts, dtype: str, facts: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """config, generation config and tokenizer of a text model. `facts` are the config's keys for facts of the whole."""
    config = made.text_config(TORCH_NAMES[dtype]) | dict(facts or {})
    config["architectures"] = [family(LLM, config).kind]
    files = {"config.json": to_json(ordered(config)), **made.generation_file()}
    files |= made.tokenizer_files()
    return files


def vision_files(model: Model, options: TargetOptions, dtype: str, layout: str, folder: str = "") -> FileSet:
    tensors = outputs(model.part(VISION), layout_table("parts"), dtype, prefix="visual-encoder/")
    return FileSet(tensors, folder=folder, limit=shard_limit(model, options, layout))


def vision_artefacts(model: Model, made: Artefacts, dtype: str, folder: str = "") -> dict[str, bytes]:
    config = made.vision_config(TORCH_NAMES[dtype])
    config["architectures"] = [family(VISION, config).kind]
    prefix = f"{folder}/" if folder else ""
    files = {f"{prefix}config.json": to_json(ordered(config))}
    preprocessor = made.preprocessor_config(for_hf=False)
    if preprocessor is not None:
        files[f"{prefix}preprocessor_config.json"] = to_json(preprocessor)
    return files
