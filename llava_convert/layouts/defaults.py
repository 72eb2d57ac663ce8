"""The defaults which depend on source and target: the dtype, and where shards end."""

from __future__ import annotations

from collections.abc import Mapping

from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import FROM_TORCH_NAMES, QUANTS
from llava_convert.layouts.info import LAYOUTS, TARGETS
from llava_convert.layouts.naming import llm_dtype
from llava_convert.model.checkpoint import AS_STORED, LLM
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.target import KEEP, parse_size

_HALF = ("F16", "BF16")


def output_dtype(model: Model, options: TargetOptions) -> str:
    """The one dtype of an output; of dequantised weights float16, as llama.cpp's own unquantised files are.

    Raises UnsupportedError (exit 4) for weights that are quantised and may not be dequantised.
    """
    refuse_quantised(model.recipes)
    if options.dtype is not None:
        return FROM_TORCH_NAMES[options.dtype]
    dtype = _published_dtype(model) or llm_dtype(model)
    if dtype in QUANTS:
        return "F16"
    if dtype not in FLOATS:
        raise UnsupportedError(
            f"most of the source is {dtype}, but an output needs one float dtype for all tensors",
            hint="give it by --dtype, if the source's tensors can be cast",
        )
    return dtype


def _published_dtype(model: Model) -> str | None:
    """The dtype to publish what a trainer left, mostly float32; None for a source that was published already."""
    rule = model.checkpoint.publish_dtype
    if rule != AS_STORED:
        return None if rule is None else FROM_TORCH_NAMES[rule]
    stored = llm_dtype(model) if model.part(LLM) else ""
    return stored if stored in _HALF else "F16"


def refuse_quantised(recipes: Mapping[str, Recipe]) -> None:
    """Raise UnsupportedError (exit 4) where a recipe ends in quantised weights: floats are needed of them."""
    types = sorted({recipe.dtype for recipe in recipes.values() if recipe.dtype in QUANTS})
    if types:
        count = sum(recipe.dtype in QUANTS for recipe in recipes.values())
        raise UnsupportedError(
            f"{count} of the {len(recipes)} tensors are quantised ({', '.join(types)}), but floats are needed",
            hint="--dequantize turns them into floats, which keep the quantisation error; "
            "it is better to convert the model's f16, bf16 or f32 file",
        )


def shard_limit(model: Model, options: TargetOptions, to: str) -> int | str:
    """Where shards end: as the user says, as the source's do, or as layout `to` has it where it has none to keep."""
    asked = options.max_shard_size
    if asked is None:
        return KEEP if LAYOUTS[model.checkpoint.layout].has_shards else parse_size(TARGETS[to].shard_size)
    return KEEP if asked == KEEP else parse_size(asked)
