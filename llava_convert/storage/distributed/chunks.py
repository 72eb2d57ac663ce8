"""A tensor put together of boxes that several files hold, each at its place in the whole.

Nothing is read: the extents of the whole follow its rows through the boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import DTYPE_BITS, Extent, StoredTensor, Stripe, gathered
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass

# A 70B model split by columns on eight ranks has 7,000, however many rows it has; each takes about 300 bytes of memory.
MAX_PIECES = 500_000
_MEND = "get the files of every rank, of one save"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: its first element's place in the whole, and the part as it is stored."""

    offsets: tuple[int, ...]
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape


class Budget:
    """How many pieces a checkpoint may be in."""

    def __init__(self, limit: int = MAX_PIECES) -> None:
        self.left = limit

    def take(self, name: str, pieces: int) -> None:
        self.left -= pieces
        if self.left < 0:
            raise UnsupportedError(
                f"{printable(name)}: the tensors lie in more pieces than are read",
                hint="save the model in whole tensors (a full state dict), and convert that",
            )


def put_together(
    name: str, shape: tuple[int, ...], chunks: Sequence[Chunk], where: Path, budget: Budget
) -> StoredTensor:
    """The whole tensor of `shape` of its chunks; copies of one chunk count once.

    Raises InputError where chunks overlap, leave a hole, lie outside or are of several dtypes; UnsupportedError for a
    chunk that is not stored row by row while there are others.
    """
    unique = list({(chunk.offsets, chunk.shape): chunk for chunk in reversed(chunks)}.values())
    told = f"{where}: {printable(name)}"
    if not unique:
        raise InputError(f"{told}: no file holds any of it", hint=_MEND)
    dtype = unique[0].stored.dtype
    for chunk in unique:
        if len(chunk.offsets) != len(shape) or len(chunk.shape) != len(shape):
            raise InputError(f"{told}: a part has the shape {list(chunk.shape)}, the whole {list(shape)}", hint=_MEND)
        if any(o < 0 or o + n > size for o, n, size in zip(chunk.offsets, chunk.shape, shape, strict=True)):
            raise InputError(
                f"{told}: a part of {list(chunk.shape)} at {list(chunk.offsets)} lies outside the whole, {list(shape)}",
                hint=_MEND,
            )
        if chunk.stored.dtype != dtype:
            raise InputError(f"{told}: its parts are of the types {dtype} and {chunk.stored.dtype}", hint=_MEND)
    if len(unique) == 1 and unique[0].shape == shape:
        return unique[0].stored.renamed(name)
    held, numel = sum(prod(chunk.shape) for chunk in unique), prod(shape)
    if held < numel:
        raise InputError(f"{told}: {held:,} of its {numel:,} elements are there: a rank's part is missing", hint=_MEND)
    if held > numel:
        raise InputError(f"{told}: its parts overlap", hint="save the model again: which part counts is not clear")
    if any(chunk.stored.strides is not None for chunk in unique):
        raise UnsupportedError(f"{told}: a part of it is not stored row by row", hint="save the model again")
    item = DTYPE_BITS[dtype] // 8
    stripes: list[Stripe] = []
    for rounds, runs in _runs((), [c for c in unique if prod(c.shape)], shape, told):
        budget.take(name, len(runs))
        pieces = []
        for run in runs:
            source = run.chunk.stored.extents[0]
            extent = Extent(source.path, source.offset + run.first * item, run.count * item)
            pieces.append((extent, run.step * item))
        stripes.append(Stripe(rounds, tuple(pieces)))
    return StoredTensor(name, dtype, shape, gathered(stripes))


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` elements of a chunk from its element `first` on; in the next round they begin `step` elements later."""

    chunk: Chunk
    first: int
    count: int
    step: int = 0


def _runs(
    at: tuple[int, ...], chunks: Sequence[Chunk], shape: tuple[int, ...], told: str
) -> Iterator[tuple[int, list[_Run]]]:
    """The elements from index `at` on, row by row: runs, and how many rounds of them follow each other."""
    dim = len(at)
    if dim == len(shape):
        if len(chunks) != 1:
            raise InputError(f"{told}: its parts overlap", hint="save the model again: which part counts is not clear")
        yield 1, [_Run(chunks[0], _index(chunks[0], at), 1)]
        return
    ends = sorted({0, shape[dim], *(e for c in chunks for e in (c.offsets[dim], c.offsets[dim] + c.shape[dim]))})
    for low, high in pairwise(ends):
        inside = [c for c in chunks if c.offsets[dim] <= low and high <= c.offsets[dim] + c.shape[dim]]
        if not inside:
            raise InputError(f"{told}: none of its parts holds index {[*at, low]}", hint=_MEND)
        if len(inside) == 1 and inside[0].shape[dim + 1 :] == shape[dim + 1 :]:
            yield 1, [_Run(inside[0], _index(inside[0], (*at, low)), (high - low) * prod(shape[dim + 1 :]))]
            continue
        inner = list(_runs((*at, low), inside, shape, told))
        if all(rounds == 1 for rounds, _ in inner):
            runs = [replace(run, step=prod(run.chunk.shape[dim + 1 :])) for _, found in inner for run in found]
            yield high - low, runs
            continue
        yield from inner
        for index in range(low + 1, high):
            yield from _runs((*at, index), inside, shape, told)


def _index(chunk: Chunk, at: tuple[int, ...]) -> int:
    """Which element of a chunk stands at the beginning of index `at` of the whole."""
    found = 0
    for dim, size in enumerate(chunk.shape):
        inside = at[dim] - chunk.offsets[dim] if dim < len(at) else 0
        found = found * size + inside
    return found
