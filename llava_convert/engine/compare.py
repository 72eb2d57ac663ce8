"""Replay planned tensors against stored ones: the same stream that writes them, compared instead of written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from llava_convert.core.arrays import FLOATS, Array, as_array, raw
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.engine.execute import run_all, thread_count
from llava_convert.engine.run import Outcome
from llava_convert.engine.shards import PlannedTensor
from llava_convert.engine.sinks import Sink
from llava_convert.engine.tasks import Copy, tasks_of
from llava_convert.ops import kernels
from llava_convert.ops.blas import one_thread
from llava_convert.ops.cast import count_nonfinite, widen
from llava_convert.ops.lora import MergeLora
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Difference:
    """How a tensor differs: elements whose bits differ (of a quantised one, whose values do), and the largest gap.

    `shapes`, of the source's and of the other, where these differ: nothing else is compared then.
    """

    elements: int = 0
    largest: float = 0.0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def as_json(self) -> dict[str, Any]:
        if self.shapes is not None:
            return {"shapes": [list(shape) for shape in self.shapes]}
        return {"elements": self.elements, "largest": None if math.isnan(self.largest) else self.largest}


@dataclass(slots=True)
class CompareSink:
    """Compares what arrives with stored tensors, by name.

    From byte `tails` of a tensor on are rows of means, which depend on the dtype that the old rows were averaged in:
    they are only held to be near.
    """

    pool: FilePool
    stored: Mapping[str, StoredTensor]
    progress: Callable[[int], None]
    differences: dict[str, Difference] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    tails: Mapping[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def copy(self, task: Copy) -> None:
        raise AssertionError("comparisons take tensors, not runs")

    def written(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        raise AssertionError("nothing is written")

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        mine = raw(data)
        theirs = bytearray(len(mine))
        stored = self.stored[tensor.name]
        read_bytes(self.pool, stored, start, memoryview(theirs), until=stored.nbytes)
        self.progress(len(mine))
        if stored.dtype in FLOATS:
            bad = count_nonfinite(as_array(theirs, stored.dtype, 1), stored.dtype)
            if bad:
                with self._lock:
                    self.nonfinite[tensor.name] = self.nonfinite.get(tensor.name, 0) + bad
        if not _same(mine, theirs):
            head = max(0, min(self.tails.get(tensor.name, stored.nbytes) - start, len(mine)))
            if not _same(mine[:head], theirs[:head]):
                self._differ(tensor.name, stored.dtype, mine[:head], theirs[:head])
            if not _same(mine[head:], theirs[head:]) and not _near(mine[head:], theirs[head:], stored.dtype):
                self._differ(tensor.name, stored.dtype, mine[head:], theirs[head:])

    def _differ(self, name: str, dtype: str, mine: memoryview, theirs: bytearray) -> None:
        largest = float("nan")
        if dtype in QUANTS:
            one, other = (kernels.dequantize(dtype, np.frombuffer(data, np.uint8)[None]) for data in (mine, theirs))
            count = max(1, int(np.count_nonzero(one != other)))
            largest = _largest_gap(one, other)
        elif dtype in FLOATS:
            first, second = as_array(mine, dtype, 1), as_array(theirs, dtype, 1)
            count = int(np.count_nonzero(first.view(f"u{first.itemsize}") != second.view(f"u{second.itemsize}")))
            largest = _largest_gap(widen(first, dtype), widen(second, dtype))
        else:
            count = sum(a != b for a, b in zip(mine, theirs, strict=True))
        with self._lock:
            found = self.differences.setdefault(name, Difference())
            found.elements += count
            found.largest = max(found.largest, largest)


def nonfinite_after(tensor: StoredTensor, row: int, pool: FilePool) -> int:
    """How many values of the rows from `row` on are NaN or infinite; 0 for a dtype that has none."""
    if tensor.dtype not in FLOATS or row >= tensor.shape[0]:
        return 0
    width = tensor.nbytes // tensor.shape[0]
    data = bytearray(tensor.nbytes - row * width)
    read_bytes(pool, tensor, row * width, memoryview(data))
    return count_nonfinite(as_array(data, tensor.dtype, 1), tensor.dtype)


def _same(mine: memoryview, theirs: bytearray) -> bool:
    """Whether bytes are equal. Python compares a view byte by byte and holds its lock: 770 us a MiB, 40 so."""
    return bool(np.array_equal(np.frombuffer(mine, np.uint8), np.frombuffer(theirs, np.uint8)))


def _near(mine: memoryview, theirs: bytearray, dtype: str) -> bool:
    """Whether two means of the same rows agree, as far as their dtypes let them: two units in the last place."""
    if dtype not in FLOATS:
        return False
    one, other = (widen(as_array(data, dtype, 1), dtype).astype(np.float64) for data in (mine, theirs))
    unit = {"F16": 2.0**-10, "BF16": 2.0**-7}.get(dtype, 2.0**-23)
    bound = 2 * unit * np.abs(one) + unit * np.abs(one).max(initial=0.0)
    return bool(np.all(np.abs(one - other) <= bound))


def _largest_gap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    with np.errstate(invalid="ignore"):
        gap = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float("nan") if np.isnan(gap).all() else float(np.nanmax(gap))


def compare(
    planned: Sequence[PlannedTensor],
    stored: Mapping[str, StoredTensor],
    pool: FilePool,
    *,
    progress: Callable[[int], None],
    threads: int = 0,
    tails: Mapping[str, int] | None = None,
) -> CompareSink:
    """Recompute every planned tensor and compare it with the stored one of its name (same dtype and shape).

    `tails` are the bytes at which added rows begin, by name.

    Raises InputError when either side cannot be read.
    """
    sink = CompareSink(pool, stored, progress, tails=tails or {})
    _run(planned, pool, sink, threads)
    return sink


def _run(planned: Sequence[PlannedTensor], pool: FilePool, sink: Sink, threads: int) -> None:
    with one_thread(), ThreadPoolExecutor(threads or thread_count(planned)) as workers:
        run_all(workers, tasks_of(planned, whole=True), pool, sink, Outcome())


def merged_in_float32(
    planned: Sequence[PlannedTensor], stored: Mapping[str, StoredTensor], pool: FilePool, *, threads: int = 0
) -> set[str]:
    """Which of the merged tensors are stored as a merge in float32 may have made them, whatever order it summed in.

    Each stored element must lie between what comes of the exact merge less all that float32's roundings may be off,
    and of the exact merge plus that, both rounded to the stored dtype (casts keep order). Quantised tensors never pass:
    a block's scale depends on all its elements. Raises InputError when either side cannot be read.
    """
    merged = [t for t in planned if t.dtype in FLOATS and any(isinstance(op, MergeLora) for op in t.ops)]
    sink = _BoundsSink(pool, stored)
    bounds = [_bound(tensor, shard, margin) for tensor in merged for shard, margin in ((_LEAST, -1), (_MOST, 1))]
    _run(bounds, pool, sink, threads)
    return {tensor.name for tensor in merged} - sink.outside


# A bound is a planned tensor of the same name, in a shard of this name.
_LEAST, _MOST = "least", "most"


def _bound(tensor: PlannedTensor, shard: str, margin: int) -> PlannedTensor:
    ops = (replace(op, margin=margin) if isinstance(op, MergeLora) else op for op in tensor.ops)
    return replace(tensor, ops=tuple(ops), shard=shard)


@dataclass(slots=True)
class _BoundsSink:
    """Compares stored tensors with the least and the most that they may be."""

    pool: FilePool
    stored: Mapping[str, StoredTensor]
    outside: set[str] = field(default_factory=set)

    def copy(self, task: Copy) -> None:
        raise AssertionError("comparisons take tensors, not runs")

    def written(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        raise AssertionError("nothing is written")

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        if tensor.name in self.outside:
            return
        theirs = bytearray(data.nbytes)
        read_bytes(self.pool, self.stored[tensor.name], start, memoryview(theirs))
        found, bound = (_exactly(as_array(held, tensor.dtype, 1), tensor.dtype) for held in (theirs, raw(data)))
        within = found >= bound if tensor.shard == _LEAST else found <= bound
        if not (within | (np.isnan(found) & np.isnan(bound))).all():
            self.outside.add(tensor.name)


def _exactly(values: Array, dtype: str) -> Array:
    return values if dtype == "F64" else widen(values, dtype)
