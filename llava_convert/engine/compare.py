"""Replay planned tensors against stored ones: the same stream that writes them, compared instead of written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llava_convert.core.arrays import FLOATS, Array, as_array, raw
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.engine.execute import run_all, thread_count, torch_beside
from llava_convert.engine.run import Outcome
from llava_convert.engine.shards import PlannedTensor
from llava_convert.engine.tasks import Copy, tasks_of
from llava_convert.ops import kernels
from llava_convert.ops.cast import count_nonfinite, widen
from llava_convert.ops.lora import MergeLora
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_bytes


@dataclass(slots=True)
class Difference:
    """How a tensor differs: elements whose bits differ (of a quantised one, whose values do), and the largest gap."""

    elements: int = 0
    largest: float = 0.0


@dataclass(slots=True)
class CompareSink:
    """Compares what arrives with stored tensors, by name."""

    pool: FilePool
    stored: Mapping[str, StoredTensor]
    progress: Callable[[int], None]
    differences: dict[str, Difference] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
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
        if mine != theirs:
            self._differ(tensor.name, stored.dtype, mine, theirs)

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
) -> CompareSink:
    """Recompute every planned tensor and compare it with the stored one of its name (same dtype and shape).

    Raises InputError when either side cannot be read.
    """
    sink = CompareSink(pool, stored, progress)
    merging = any(isinstance(op, MergeLora) for tensor in planned for op in tensor.ops)
    with torch_beside(needed=merging) as ready, ThreadPoolExecutor(threads or thread_count(planned)) as workers:
        run_all(workers, tasks_of(planned, whole=True), pool, sink, Outcome(), ready)
    return sink
