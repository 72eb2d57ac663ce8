"""Run a plan: stream every tensor to its place in bounded memory, shard by shard.

Work is cut into tasks whose bounds depend on the plan alone; threads only decide who does them. Copied runs go
from file to file, everything else goes through its ops in row blocks.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Protocol

from llava_convert.errors import MismatchError
from llava_convert.mapping import printable
from llava_convert.numerics import Array, CastLoss, raw, use_torch
from llava_convert.ops import Context, MergeLora
from llava_convert.plan import Plan, PlannedTensor, Shard
from llava_convert.spec import TORCH_NAMES
from llava_convert.storage.ranges import PIECE, FilePool, copy_range, start_writeback, write_all
from llava_convert.storage.staging import Staging
from llava_convert.storage.streams import (
    BLOCK,
    blocks,
    columns_of,
    cuts,
    read_bytes,
    read_whole,
    rows_of,
    rows_per_block,
)

# One task's share: large enough that its overhead is nothing, small enough to keep every thread busy to the end.
SHARE = 64 * 1024 * 1024

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Copy:
    """`length` bytes from `offset` of `path` to byte `at` of the shard; they may span several tensors."""

    path: Path
    offset: int
    at: int
    length: int


@dataclass(frozen=True, slots=True)
class Work:
    """Rows `first` to `last` of a tensor's source through its ops (all rows when an op needs them)."""

    tensor: PlannedTensor
    first: int
    last: int


class Sink(Protocol):
    """Where a shard's bytes go: a file to write, memory, or a file to compare with."""

    def copy(self, task: Copy) -> None: ...

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        """What ops made, from byte `start` of the output tensor on."""
        ...


@dataclass(slots=True)
class Outcome:
    """What a run found: cast losses and content digests, by tensor."""

    losses: dict[str, CastLoss] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def lose(self, name: str, loss: CastLoss) -> None:
        with self._lock:
            self.losses.setdefault(name, CastLoss()).add(loss)

    @property
    def flushed(self) -> int:
        return sum(loss.flushed for loss in self.losses.values())

    @property
    def nonfinite(self) -> dict[str, int]:
        return {name: loss.nonfinite for name, loss in self.losses.items() if loss.nonfinite}

    def refuse_overflow(self) -> None:
        """Raise MismatchError (exit 7) when a cast made a finite value infinite."""
        bad = {name: loss.overflowed for name, loss in self.losses.items() if loss.overflowed > 0}
        if bad:
            name = min(bad)
            more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
            raise MismatchError(
                f"{printable(name)}: {bad[name]} finite values do not fit the output's dtype{more}",
                hint="use --dtype bfloat16, which has the range of float32",
            )


@dataclass(frozen=True, slots=True)
class FileSink:
    """Writes into one open file; several threads may."""

    pool: FilePool
    fd: int
    progress: Progress

    def copy(self, task: Copy) -> None:
        source = self.pool.open(task.path)
        copy_range(source, task.offset, self.fd, task.at, task.length, progress=self.progress, where=task.path)

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        at = tensor.offset + start
        write_all(self.fd, at, raw(data))
        # Blocks are too small to start writeback one by one; started whenever a piece is full, it takes the fsync
        # at the end from 0.11 s to 0.03 s for 350 MB.
        full = (at + data.nbytes) // PIECE * PIECE
        if full > at:
            start_writeback(self.fd, full - PIECE, PIECE)
        self.progress(data.nbytes)


@dataclass(slots=True)
class MemorySink:
    """Keeps tensors in memory: for the one small file whose format cannot be streamed."""

    tensors: dict[str, bytearray]

    def copy(self, task: Copy) -> None:
        raise AssertionError("memory sinks take tensors, not runs")

    def put(self, tensor: PlannedTensor, start: int, data: Array) -> None:
        self.tensors[tensor.name][start : start + data.nbytes] = raw(data)


def tasks_of(tensors: Sequence[PlannedTensor], *, whole: bool = False) -> list[Copy | Work]:
    """Cut tensors into tasks. `whole`: one task a tensor and no bare copies (for digests and memory)."""
    copies: list[Copy] = []
    work: list[Copy | Work] = []
    for tensor in tensors:
        rows = rows_of(tensor.source.shape)
        if whole:
            work.append(Work(tensor, 0, rows))
        elif tensor.is_copy:
            at = tensor.offset
            for extent in tensor.source.extents:
                if extent.length:
                    copies.append(Copy(extent.path, extent.offset, at, extent.length))
                at += extent.length
        elif tensor.source.strides is None and all(op.row_local for op in tensor.ops):
            step = rows_per_block(tensor.source)
            share = step * max(1, SHARE // max(1, step * tensor.source.nbytes // max(1, rows)))
            work += [Work(tensor, row, end) for row, end in cuts(tensor.source, 0, rows, share)]
        else:
            work.append(Work(tensor, 0, rows))
    return [*_runs(copies), *work]


def _runs(copies: Sequence[Copy]) -> Iterator[Copy]:
    """Join copies which follow each other on both sides, then cut the runs into shares."""
    joined: list[Copy] = []
    for task in sorted(copies, key=lambda c: c.at):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.path == task.path
            and last.offset + last.length == task.offset
            and last.at + last.length == task.at
        ):
            joined[-1] = Copy(last.path, last.offset, last.at, last.length + task.length)
        else:
            joined.append(task)
    for run in joined:
        for done in range(0, run.length, SHARE):
            yield Copy(run.path, run.offset + done, run.at + done, min(SHARE, run.length - done))


def run_task(task: Copy | Work, pool: FilePool, sink: Sink, outcome: Outcome, *, digest: bool = False) -> None:
    """Do one task. Raises what reading and writing raise, and UnsupportedError from ops."""
    if isinstance(task, Copy):
        sink.copy(task)
        return
    tensor, loss = task.tensor, CastLoss()
    hasher = None
    if digest:
        import xxhash

        hasher = xxhash.xxh3_128()
    at = task.first * columns_of(tensor.shape) * _itemsize(tensor)
    for block in _stream(task, pool, loss):
        data = block if block.flags.c_contiguous else block.copy()
        if hasher is not None:
            hasher.update(raw(data))
        sink.put(tensor, at, data)
        at += data.nbytes
    if hasher is not None:
        outcome.digests[tensor.name] = hasher.hexdigest()
    if tensor.ops:
        outcome.lose(tensor.name, loss)


def _stream(task: Work, pool: FilePool, loss: CastLoss) -> Iterator[Array]:
    tensor, source = task.tensor, task.tensor.source
    if tensor.is_copy:
        yield from _raw(pool, task)
        return
    stream = blocks(pool, source, task.first, task.last)
    dtype, shape = source.dtype, source.shape
    context = Context(lambda stored: read_whole(pool, stored), loss, task.first)
    for op in tensor.ops:
        stream = op.stream(stream, dtype, shape or (1,), context)
        dtype, shape = op.result(dtype, shape)
    yield from stream


def _raw(pool: FilePool, task: Work) -> Iterator[Array]:
    """A tensor's bytes, unparsed: any dtype, block by block."""
    import numpy as np

    source = task.tensor.source
    buffer = bytearray(BLOCK)
    for start in range(0, source.nbytes, BLOCK):
        view = memoryview(buffer)[: min(BLOCK, source.nbytes - start)]
        read_bytes(pool, source, start, view)
        yield np.frombuffer(view, np.uint8)


def _itemsize(tensor: PlannedTensor) -> int:
    count = rows_of(tensor.shape) * columns_of(tensor.shape)
    return tensor.nbytes // count if count else 0


def execute(
    plan: Plan, stage: Staging, pool: FilePool, *, threads: int = 0, digest: bool = False, progress: Progress
) -> Outcome:
    """Write every shard of the plan into the stage, then its files, indexes last.

    Raises InputError when a source changes or ends early, OutputError when the disk refuses, MismatchError when a
    cast overflows. The caller commits.
    """
    outcome = Outcome()
    with (
        torch_beside(needed=any(map(_merges, plan.tensors))) as torch_ready,
        ThreadPoolExecutor(threads or thread_count()) as workers,
    ):
        for shard in plan.shards:
            if stage.finished(shard.name):
                progress(sum(t.nbytes for t in shard.tensors))
            elif shard.container == "torch":
                data = _torch_file(shard, pool, outcome, digest=digest)
                outcome.refuse_overflow()
                stage.write_bytes(shard.name, data)
            else:
                with stage.new_file(shard.name, shard.size) as fd:
                    write_all(fd, 0, memoryview(shard.header))
                    sink = FileSink(pool, fd, progress)
                    tasks = tasks_of(shard.tensors, whole=digest)
                    run_all(workers, tasks, pool, sink, outcome, torch_ready, digest=digest)
                    outcome.refuse_overflow()  # before the file counts as finished, which a resumed run would keep
    for files in (plan.files, plan.indexes):
        for name, data in files.items():
            stage.write_bytes(name, data)
    return outcome


def _merges(tensor: PlannedTensor) -> bool:
    return any(isinstance(op, MergeLora) for op in tensor.ops)


def run_all(
    workers: ThreadPoolExecutor,
    tasks: Sequence[Copy | Work],
    pool: FilePool,
    sink: Sink,
    outcome: Outcome,
    torch_ready: Callable[[], None],
    *,
    digest: bool = False,
) -> None:
    """Run tasks on the workers, copies first; the first error stops the rest and is raised."""
    running: list[Future[None]] = []
    stopped = threading.Event()

    def copy_all() -> None:
        for task in copies:
            if stopped.is_set():
                return
            run_task(task, pool, sink, outcome)

    copies = [task for task in tasks if isinstance(task, Copy)]
    work = [task for task in tasks if isinstance(task, Work)]
    try:
        # One thread copies: two writing to one file spin on its lock, which takes the other core from the writeback.
        running += [workers.submit(copy_all)] if copies else []
        if work:
            # Copies hardly hold the interpreter's lock; arithmetic beside the import of torch wants it for a few
            # microseconds at a time, and both then ran at half their speed (import 1.4 s alone, 2.4 s so).
            torch_ready()
        running += [workers.submit(run_task, task, pool, sink, outcome, digest=digest) for task in work]
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        stopped.set()
        for future in running:
            future.cancel()
        wait(running)
        raise


def thread_count() -> int:
    """As many as there are cores to run on, up to four: disks gain nothing from more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


@contextmanager
def torch_beside(*, needed: bool) -> Iterator[Callable[[], None]]:
    """Import torch beside the first copies; what is yielded waits until it is there.

    Meanwhile torch keeps to one thread: ours share out the work, and one thread a product fixes the order of its
    sums.
    """
    before: list[int] = []

    def load() -> None:
        collecting = gc.isenabled()
        gc.disable()  # a seventh of the import's time goes to walking what it makes
        try:
            import torch
        finally:
            if collecting:
                gc.enable()
        before.append(torch.get_num_threads())
        torch.set_num_threads(1)
        use_torch()

    loader = threading.Thread(target=load, daemon=True)
    if needed:
        loader.start()
    try:
        yield loader.join if needed else lambda: None
    finally:
        if needed:
            loader.join()
            import torch

            torch.set_num_threads(before[0])


def _torch_file(shard: Shard, pool: FilePool, outcome: Outcome, *, digest: bool = False) -> bytes:
    """A shard as torch.save writes it: for `mm_projector.bin`, whose reader calls torch.load."""
    import torch

    sink = MemorySink({t.name: bytearray(t.nbytes) for t in shard.tensors})
    for task in tasks_of(shard.tensors, whole=True):
        run_task(task, pool, sink, outcome, digest=digest)
    state = {}
    for t in shard.tensors:
        dtype = getattr(torch, TORCH_NAMES[t.dtype])
        state[t.name] = torch.frombuffer(sink.tensors[t.name], dtype=dtype).reshape(t.shape)
    out = BytesIO()
    torch.save(state, out)
    return out.getvalue()
