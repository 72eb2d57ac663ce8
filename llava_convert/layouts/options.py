"""The defaults which depend on source and target: the dtype, and where shards end."""

from __future__ import annotations

from llava_convert.errors import UnsupportedError
from llava_convert.layouts.base import TargetOptions
from llava_convert.layouts.naming import llm_dtype
from llava_convert.model import Model
from llava_convert.numerics import FLOATS
from llava_convert.plan import KEEP, parse_size
from llava_convert.spec import FROM_TORCH_NAMES

# What training leaves is float32 and published in float16; other sources keep theirs.
_TRAINED = ("pth", "xtuner")


def output_dtype(model: Model, options: TargetOptions) -> str:
    """The one dtype of an output."""
    if options.dtype is not None:
        return FROM_TORCH_NAMES[options.dtype]
    if model.checkpoint.layout in _TRAINED:
        return "F16"
    dtype = llm_dtype(model)
    if dtype not in FLOATS:
        raise UnsupportedError(
            f"the source is mostly {dtype}, and an output has one float dtype throughout",
            hint="give it by --dtype, if the source's tensors can be cast",
        )
    return dtype


def shard_limit(model: Model, options: TargetOptions, *, trained: str = "2GB") -> int | str:
    """Where shards end: as the user says, as the source's do, or after `trained` for a `.pth`."""
    asked = options.max_shard_size
    if asked is None:
        return parse_size(trained) if model.checkpoint.layout == "pth" else KEEP
    return KEEP if asked == KEEP else parse_size(asked)
