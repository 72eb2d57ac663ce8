"""The ops that join tensors by their rows, and that take one of several joined tensors out again.

Families fuse the projections of attention, and llama.cpp takes some apart: Phi-3's `qkv_proj` is q, k and v one after
the other; InternLM2's `wqkv` holds, for each head of keys, its heads of queries, then one of keys and one of values.
Both are the same: so many groups of rows, in each of which every member has a share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor, Stripe, cut, gathered, nbytes_of
from llava_convert.core.values import dataclass
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Dequantize, Quantize


@dataclass(frozen=True, slots=True)
class Part:
    """One of several joined tensors: in each of `groups` groups of `of` rows, the `rows` rows from `start` on.

    Of a tensor that lies row by row these are spans of its bytes, and no op is done at all (`stored`).
    """

    groups: int
    start: int
    rows: int
    of: int
    name = "part"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if not shape or shape[0] != self.groups * self.of:
            raise UnsupportedError(
                f"cannot take rows out of shape {list(shape)}: they are not {self.groups} groups of {self.of}",
                hint="the config's head counts are not those of the weights",
            )
        return dtype, (self.groups * self.rows, *shape[1:])

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        row = 0
        for block in blocks:
            place = np.arange(row, row + len(block)) % self.of
            row += len(block)
            yield block[(place >= self.start) & (place < self.start + self.rows)]

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "groups": self.groups, "start": self.start, "rows": self.rows, "of": self.of}

    def stored(self, tensor: StoredTensor) -> StoredTensor | None:
        """The part as a stored tensor, its bytes where they are; None where those of a row do not lie together."""
        dtype, shape = self.result(tensor.dtype, tensor.shape)
        if tensor.strides is not None or not tensor.extents:
            return None
        row = tensor.nbytes // tensor.shape[0]
        starts = ((group * self.of + self.start) * row for group in range(self.groups))
        spans = (span for start in starts for span in cut(tensor.extents, start, self.rows * row))
        return StoredTensor(tensor.name, dtype, shape, gathered(spans))


@dataclass(frozen=True, slots=True)
class Chain:
    """A member of a join: a stored tensor, and the ops on its way there."""

    tensor: StoredTensor
    ops: tuple[Op, ...] = ()

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor that it reads."""
        return (self.tensor, *(one for op in self.ops for one in op.inputs()))


@dataclass(frozen=True, slots=True)
class Join:
    """The rows of several tensors as one: in each of `groups` groups so many `rows` of every member in turn.

    The first member is what the op is done to, `others` follow. It is the last op of a tensor, and no rows go through
    it: those of each member are written where they belong (`parts` says where).
    """

    groups: int
    rows: tuple[int, ...]
    others: tuple[Chain, ...]
    name = "join"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which rows of what comes out each member's are."""
        return parts(self.groups, self.rows)

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return dtype, (self.groups * sum(self.rows), *shape[1:])

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        raise AssertionError("the members of a join are written apart")

    def inputs(self) -> tuple[StoredTensor, ...]:
        return tuple(stored for one in self.others for stored in one.stored)

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return self.parts[0]

    def describe(self) -> dict[str, Any]:
        others = [[op.describe() for op in one.ops] for one in self.others]
        return {"op": self.name, "groups": self.groups, "rows": list(self.rows), "others": others}


def parts(groups: int, rows: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a tensor whose groups hold so many rows of each member in turn."""
    ends = list(accumulate(rows))
    return tuple(Part(groups, end - own, own, ends[-1]) for end, own in zip(ends, rows, strict=True))


def shares(total: int, groups: int, weights: Sequence[int]) -> list[int]:
    """How many of `total` rows each member has in a group, by its weight. Raises UnsupportedError for a rest."""
    unit, rest = divmod(total, groups * sum(weights)) if groups * sum(weights) > 0 else (0, 1)
    if rest or unit == 0:
        raise UnsupportedError(
            f"{total} rows are not {groups} groups of which members have shares of {', '.join(map(str, weights))}",
            hint="the config's head counts are not those of the weights",
        )
    return [unit * weight for weight in weights]


def joined(tensors: Sequence[StoredTensor], groups: int) -> StoredTensor | None:
    """Stored tensors of one dtype as one, their bytes where they are; None where those of a row do not lie together."""
    if any(tensor.strides is not None or not tensor.extents for tensor in tensors):
        return None
    columns = tensors[0].shape[1:]
    spans: list[Stripe] = []
    for group in range(groups):
        for tensor in tensors:
            size = tensor.nbytes // groups
            spans += cut(tensor.extents, group * size, size)
    rows = sum(tensor.shape[0] for tensor in tensors)
    return StoredTensor(tensors[0].name, tensors[0].dtype, (rows, *columns), gathered(spans))


def on_rows(op: Op, part: Part) -> Op | None:
    """The op that does to a part what `op` does to the whole; None where a row's outcome depends on other rows."""
    if isinstance(op, Cast | Quantize | Dequantize):
        return op
    if isinstance(op, MergeLora) and not op.embedding:
        b = part.stored(op.b)
        magnitude = part.stored(op.magnitude) if op.magnitude is not None else None
        if b is not None and (magnitude is None) == (op.magnitude is None):
            return replace(op, b=b, magnitude=magnitude)
    return None


def alike(ops: Sequence[Op]) -> bool:
    """Whether ops do the same to every row, wherever it stands."""
    return all(isinstance(op, Cast | Quantize | Dequantize) for op in ops)


def every(ops: Iterable[Op]) -> Iterator[Op]:
    """All ops of a tensor, those of the members of a join too."""
    for op in ops:
        yield op
        if isinstance(op, Join):
            for one in op.others:
                yield from one.ops


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of one row of a tensor."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return nbytes_of(dtype, columns)
