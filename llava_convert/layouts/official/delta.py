"""Recognise a delta: LLaVA's first models were published as their weights less those of LLaMA.

`llava.model.apply_delta` adds the two. Neither names nor config of a delta differ from a model's (llava-torch 1.2.2,
llava/model/make_delta.py), so that its last norm is read, of some kilobytes: its factors are above zero in a model, and
differences of two such lie about zero.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from llava_convert.core.arrays import FLOATS
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.kinds import Known, NotAModelError
from llava_convert.ops.cast import widen
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole

_NORM = "language_model.model.norm.weight"
_SHARE = 0.25  # of the factors


def refuse(path: Path, llm: Mapping[str, StoredTensor], projector: Mapping[str, StoredTensor]) -> None:
    """Raise NotAModelError (exit 4) for a delta. Only models of that time have a projector of one linear layer."""
    norm = llm.get(_NORM)
    if norm is None or norm.dtype not in FLOATS or not _one_linear(projector):
        return
    with FilePool() as pool:
        factors = widen(read_whole(pool, norm), norm.dtype)
    if (factors <= 0).mean() > _SHARE:
        apply = ["python3", "-m", "llava.model.apply_delta", "--base-model-path", "LLAMA", "--target-model-path", "OUT"]
        raise NotAModelError(
            path,
            Known(
                "delta",
                "a delta of official LLaVA, its weights less those of LLaMA",
                "a LLaVA once they are added to the LLaMA that it was trained from",
                shlex.join([*apply, "--delta-path", str(path)]),
            ),
        )


def _one_linear(projector: Mapping[str, StoredTensor]) -> bool:
    return {name.rpartition(".")[0] for name in projector} == {"projector.0"}
