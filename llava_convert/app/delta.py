"""Recognise a delta: LLaVA's first models were published as their weights less those of LLaMA.

`llava.model.apply_delta` adds the two. Neither names nor config of a delta differ from a model's (llava-torch 1.2.2,
llava/model/make_delta.py), so that its last norm is read, of some kilobytes: its factors are above zero in a model, and
differences of two such lie about zero.
"""

from __future__ import annotations

import shlex

import numpy as np

from llava_convert.core.arrays import FLOATS
from llava_convert.model.checkpoint import LLM
from llava_convert.model.recipe import Model
from llava_convert.ops.cast import widen
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole

_NORM = "language_model.model.norm.weight"
_SHARE, _SMALL = 0.25, 0.1  # of the factors, so many not above zero; half of them smaller than this
_OF_GEMMA = ".pre_feedforward_layernorm."  # whose norms hold what is added to 1


def doubt(model: Model, pool: FilePool) -> str | None:
    """What to say of a model that seems to be a delta. A warning, since nothing but its weights tells."""
    checkpoint = model.checkpoint
    weights = checkpoint.parts[LLM].weights
    norm = weights.get(_NORM)
    if norm is None or norm.dtype not in FLOATS or any(_OF_GEMMA in name for name in weights):
        return None
    factors = widen(read_whole(pool, norm), norm.dtype)
    if not factors.size or (factors <= 0).mean() <= _SHARE or np.median(np.abs(factors)) >= _SMALL:
        return None
    apply = ["python3", "-m", "llava.model.apply_delta", "--base-model-path", "LLAMA", "--target-model-path", "OUT"]
    return (
        "this seems to be a delta, the weights of a LLaVA less those of its LLaMA, which answers nothing by itself: "
        f"`{shlex.join([*apply, '--delta-path', str(checkpoint.path)])}` makes the model of it"
    )
