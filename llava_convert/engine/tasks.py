"""A plan cut into tasks, whose bounds depend on the plan alone: threads only decide who does them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm
from pathlib import Path

from llava_convert.core.tensors import Striped
from llava_convert.core.values import dataclass
from llava_convert.engine.shards import PlannedTensor
from llava_convert.ops.base import Op
from llava_convert.ops.quantize import Quantize
from llava_convert.storage.streams import cuts, rows_of, rows_per_block

# One task's share: large enough that its overhead is nothing, small enough to keep every thread busy to the end.
SHARE = 64 * 1024 * 1024
# Of a source that is quantised: up to 50 ns a weight where that is not vectorised, half a second for each type.
QUANTISED_SHARE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Copy:
    """`length` bytes from `offset` of `path` to byte `at` of the shard; they may span several tensors."""

    path: Path
    offset: int
    at: int
    length: int
    shard: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """Rows `first` to `last` of one source, read once, through the ops of every tensor that is made of it.

    All rows when an op needs them. Blocks hold multiples of `together` rows.
    """

    tensors: tuple[PlannedTensor, ...]
    first: int
    last: int
    together: int = 1


@dataclass(frozen=True, slots=True)
class Assembly:
    """A joined tensor in one task: the work on each of its members in turn."""

    tensor: PlannedTensor
    work: tuple[Work, ...]


Task = Copy | Work | Assembly


def tasks_of(tensors: Sequence[PlannedTensor], *, whole: bool = False) -> list[Task]:
    """Cut tensors into tasks; the members of a join are cut as tensors of their own.

    `whole`: one task a source, or joined tensor, and no bare copies (for digests).
    """
    copies: list[Copy] = []
    work: list[Task] = []
    if whole:
        for tensor in (tensor for tensor in tensors if len(tensor.pieces) > 1):
            work.append(Assembly(tensor, tuple(one for piece in tensor.pieces for one in _work((piece,), whole=True))))
        tensors = [tensor for tensor in tensors if len(tensor.pieces) == 1]
    for group in _by_source([piece for tensor in tensors for piece in tensor.pieces]):
        striped = isinstance(group[0].source.extents, Striped)  # a task for each of its pieces would fill the memory
        if not whole and not striped and all(tensor.is_copy for tensor in group):
            for tensor in group:
                copies += _copies(tensor)
        else:
            work += _work(group, whole=whole)
    return [*_runs(copies), *work]


def _by_source(tensors: Sequence[PlannedTensor]) -> list[tuple[PlannedTensor, ...]]:
    """Tensors that one stream can make: of one source, and alike up to the last op that changes how many rows go by."""
    groups: dict[object, list[PlannedTensor]] = {}
    for tensor in tensors:
        needs = [together for _, together in _together(tensor)]
        streamed = max((i for i, together in enumerate(needs, 1) if together == 0), default=0)
        groups.setdefault((tensor.source, tensor.ops[:streamed]), []).append(tensor)
    return list(map(tuple, groups.values()))


def _together(tensor: PlannedTensor) -> Iterator[tuple[Op, int]]:
    """Each op, and how many rows it wants in one block."""
    dtype, shape = tensor.source.dtype, tensor.source.shape
    for op in tensor.ops:
        dtype, out = op.result(dtype, shape)
        yield op, op.rows_together(shape)
        shape = out


def _work(group: tuple[PlannedTensor, ...], *, whole: bool) -> Iterator[Work]:
    source, steps = group[0].source, [step for tensor in group for step in _together(tensor)]
    together = lcm(*(rows for _, rows in steps if rows))
    rows = rows_of(source.shape)
    if whole or source.strides is not None or not all(rows for _, rows in steps):
        yield Work(group, 0, rows, together)
        return
    most = QUANTISED_SHARE if any(isinstance(op, Quantize) for op, _ in steps) else SHARE
    step = rows_per_block(source, together)
    share = step * max(1, most // max(1, step * source.nbytes // max(1, rows)))
    for row, end in cuts(0, rows, share):
        yield Work(group, row, end, together)


def _copies(tensor: PlannedTensor) -> Iterator[Copy]:
    start = 0
    for extent in tensor.source.extents:
        done = 0
        for at, length in tensor.spans(start, extent.length):
            yield Copy(extent.path, extent.offset + done, tensor.offset + at, length, tensor.shard)
            done += length
        start += extent.length


def _runs(copies: Sequence[Copy]) -> Iterator[Copy]:
    """Join copies which follow each other on both sides, then cut the runs into shares."""
    joined: list[Copy] = []
    for task in sorted(copies, key=lambda c: (c.shard, c.at)):
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.shard, last.path) == (task.shard, task.path)
            and last.offset + last.length == task.offset
            and last.at + last.length == task.at
        ):
            joined[-1] = Copy(last.path, last.offset, last.at, last.length + task.length, last.shard)
        else:
            joined.append(task)
    for run in joined:
        for done in range(0, run.length, SHARE):
            yield Copy(run.path, run.offset + done, run.at + done, min(SHARE, run.length - done), run.shard)
