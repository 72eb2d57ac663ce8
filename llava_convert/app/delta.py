"""Recognise a delta: LLaVA's first models were published as their weights less those of LLaMA.

`llava.model.apply_delta` adds the two. Neither names nor config of a delta differ from a model's (llava-torch 1.2.2,
llava/model/make_delta.py), so that its last norm is read, of some kilobytes: its factors are above zero in a model, and
differences of two such lie about zero.
"""

from __future__ import annotations

import shlex
import struct
from statistics import median

from llava_convert.core.tensors import StoredTensor
from llava_convert.model.checkpoint import LLM
from llava_convert.model.recipe import Model
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_bytes

_NORM = "language_model.model.norm.weight"
_SHARE, _SMALL = 0.25, 0.1  # of the factors, so many not above zero; half of them smaller than this
_CODES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f"}  # of `struct`
_OF_GEMMA = ".pre_feedforward_layernorm."  # whose norms hold what is added to 1


def doubt(model: Model, pool: FilePool) -> str | None:
    """What to say of a model that seems to be a delta. A warning, since nothing but its weights tells."""
    checkpoint = model.checkpoint
    weights = checkpoint.parts[LLM].weights
    norm = weights.get(_NORM)
    if (
        norm is None
        or norm.dtype not in _CODES
        or norm.strides is not None
        or any(_OF_GEMMA in name for name in weights)
    ):
        return None
    factors = _numbers(pool, norm)
    if sum(x <= 0 for x in factors) <= _SHARE * len(factors) or median(map(abs, factors)) >= _SMALL:
        return None
    apply = ["python3", "-m", "llava.model.apply_delta", "--base-model-path", "LLAMA", "--target-model-path", "OUT"]
    return (
        "this seems to be a delta, the weights of a LLaVA less those of its LLaMA, which answers nothing by itself: "
        f"`{shlex.join([*apply, '--delta-path', str(checkpoint.path)])}` makes the model of it"
    )


def _numbers(pool: FilePool, norm: StoredTensor) -> tuple[float, ...]:
    """Some thousands of numbers, without NumPy, whose import takes longer than many a conversion."""
    raw = bytearray(norm.nbytes)
    read_bytes(pool, norm, 0, memoryview(raw))
    if norm.dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[::2], raw[1::2]
        raw = wide
    return struct.unpack(f"<{norm.numel}{_CODES[norm.dtype]}", raw)
