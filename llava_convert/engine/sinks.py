"""Where the bytes of planned tensors go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Protocol

from llava_convert.core.arrays import Array, raw
from llava_convert.core.values import dataclass
from llava_convert.engine.shards import PlannedTensor
from llava_convert.engine.tasks import Copy
from llava_convert.storage.ranges import PIECE, FilePool, read_back, start_writeback, write_all
from llava_convert.storage.streams import BLOCK

Progress = Callable[[int], None]


class Sink(Protocol):
    """Where a shard's bytes go: a file to write, or one to compare with."""

    def copy(self, task: Copy) -> None: ...

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        """What ops made, from byte `start` of the output tensor on."""
        ...

    def written(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        """A tensor's bytes as they were put, piece by piece."""
        ...


@dataclass(frozen=True, slots=True)
class FileSink:
    """Writes into open files, by the shard's name; several threads may. `keep` is as for `write_all`."""

    pool: FilePool
    files: Mapping[str, int]
    progress: Progress
    keep: bool = True
    writing: threading.Lock = field(default_factory=threading.Lock)

    def copy(self, task: Copy) -> None:
        to = self.files[task.shard]
        self.pool.copy_to(task.path, task.offset, to, task.at, task.length, progress=self.progress, keep=self.keep)

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        at, fd = tensor.offset + start, self.files[tensor.shard]
        with self.writing:  # two threads that write into one file spin on its lock, at the cost of a core
            write_all(fd, at, raw(data), keep=self.keep)
        # Blocks are too small to start writeback one by one; started whenever a piece is full, it takes the fsync
        # at the end from 0.11 s to 0.03 s for 350 MB.
        full = (at + data.nbytes) // PIECE * PIECE
        if full > at:
            start_writeback(fd, full - PIECE, PIECE)
        self.progress(data.nbytes)

    def written(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        for start in range(0, tensor.nbytes, BLOCK):
            size = min(BLOCK, tensor.nbytes - start)
            yield memoryview(read_back(self.files[tensor.shard], tensor.offset + start, size))


@dataclass(slots=True)
class MemorySink:
    """Keeps tensors in memory: for a model that is to run."""

    tensors: dict[str, bytearray]
    progress: Progress = lambda done: None

    def copy(self, task: Copy) -> None:
        raise AssertionError("memory sinks take tensors, not runs")

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        self.tensors[tensor.name][start : start + data.nbytes] = raw(data)
        self.progress(data.nbytes)

    def written(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        yield memoryview(self.tensors[tensor.name])
