"""Run a plan: stream every tensor to its place in bounded memory, batch by batch of shards.

Copied runs go from file to file, everything else goes through its ops in row blocks. Files that hold the same
tensors in several types are written together, so that each source is read once.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from importlib import import_module

from llava_convert.engine.plan import Plan
from llava_convert.engine.run import Outcome, run_task
from llava_convert.engine.shards import PlannedTensor, Shard
from llava_convert.engine.sinks import FileSink, MemorySink, Progress, Sink
from llava_convert.engine.tasks import Copy, Task, tasks_of
from llava_convert.ops.blas import one_thread
from llava_convert.ops.quantize import Quantize
from llava_convert.storage.output.staging import Stage
from llava_convert.storage.ranges import FilePool, write_all
from llava_convert.storage.remote.mounts import remote_of


def execute(
    plan: Plan,
    stage: Stage,
    pool: FilePool,
    *,
    names: Collection[str] | None = None,
    threads: int = 0,
    digest: bool = False,
    keep: bool = True,
    progress: Progress,
    on_file: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Write the shards of the plan that are called `names` into the stage; without `names` all, and then its files.

    `on_file` is called with the name of each file, before the first byte of it. Without `keep` files leave the memory
    as they are written.
    Raises InputError when a source changes or ends early, OutputError when the disk refuses, MismatchError when a
    cast overflows. The caller commits.
    """
    outcome = Outcome()
    batches = [[shard for shard in batch if names is None or shard.name in names] for batch in plan.batches]

    def computes(batch: Sequence[Shard]) -> bool:
        return any(not t.is_copy for shard in batch if not stage.finished(shard.name) for t in shard.tensors)

    with ThreadPoolExecutor(threads or thread_count(plan.tensors)) as workers:
        # What is copied goes first: NumPy takes 0.1 s to import, and nobody waits for it then.
        numpy = workers.submit(import_module, "numpy") if any(map(computes, batches)) else None
        for batch in sorted(batches, key=computes):
            if numpy is not None and computes(batch):
                numpy.result()  # two threads that import parts of it at once get halves of it
            for shard in (shard for shard in batch if stage.finished(shard.name)):
                outcome.take(shard.name, stage.found.get(shard.name, {}))
                progress(sum(t.nbytes for t in shard.tensors))
            left = [shard for shard in batch if not stage.finished(shard.name)]
            if left:
                on_file(left[0].name if len(left) == 1 else f"{left[0].name} +{len(left) - 1}")
            with ExitStack() as opened:
                files = {shard.name: opened.enter_context(stage.new_file(shard.name, shard.size)) for shard in left}
                for shard in left:
                    for at, piece in ((0, shard.header), *shard.pieces):
                        write_all(files[shard.name], at, memoryview(piece))
                tasks = tasks_of([t for shard in left for t in shard.tensors], whole=digest)
                # Checks are of the bytes as they were written, read back from the memory.
                sink = FileSink(pool, files, progress, keep or any(shard.checks for shard in left))
                run_all(workers, tasks, pool, sink, outcome, digest=digest)
                outcome.refuse_overflow()  # before the files count as finished, which a resumed run would keep
                for shard in left:
                    _write_checks(workers, shard, files[shard.name], sink)
                    stage.tell(shard.name, outcome.of(shard.name))
    for small in (plan.files, plan.indexes) if names is None else ():
        for name, data in small.items():
            stage.write_bytes(name, data)
    return outcome


def in_memory(plan: Plan, pool: FilePool, *, threads: int = 0, progress: Progress) -> dict[str, bytearray]:
    """The bytes of every tensor of a plan, by name, and nothing on disk.

    Raises what `execute` raises of sources and casts.
    """
    outcome, sink = Outcome(), MemorySink({t.name: bytearray(t.nbytes) for t in plan.tensors}, progress)
    with ThreadPoolExecutor(threads or thread_count(plan.tensors)) as workers:
        run_all(workers, tasks_of(plan.tensors, whole=True), pool, sink, outcome)
    outcome.refuse_overflow()
    return sink.tensors


def run_all(
    workers: ThreadPoolExecutor,
    tasks: Sequence[Task],
    pool: FilePool,
    sink: Sink,
    outcome: Outcome,
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

    copies: list[Copy] = []
    remote: list[Copy] = []  # over the network one thread waits most of the time
    for task in (task for task in tasks if isinstance(task, Copy)):
        (copies if remote_of(task.path) is None else remote).append(task)
    work = [task for task in tasks if not isinstance(task, Copy)]
    try:
        # One thread copies: two writing to one file spin on its lock, which takes the other core from the writeback.
        running += [workers.submit(copy_all)] if copies else []
        running += [workers.submit(run_task, task, pool, sink, outcome, stopped=stopped) for task in remote]
        with one_thread() if work else nullcontext():
            running += [
                workers.submit(run_task, task, pool, sink, outcome, digest=digest, stopped=stopped) for task in work
            ]
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                future.result()
    except BaseException:
        stopped.set()
        pool.stop()
        for future in running:
            future.cancel()
        wait(running)
        raise


def thread_count(tensors: Sequence[PlannedTensor]) -> int:
    """As many as there are cores to run on, up to four: disks gain nothing from more. Quantising does, up to 16.

    Over the network eight, whatever the cores: each waits for its own answer.
    """
    if any(remote_of(path) is not None for path in {path for t in tensors for path in t.source.paths}):
        return 8
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16 if any(isinstance(op, Quantize) for t in tensors for op in t.ops) else 4, cores)


def _write_checks(workers: ThreadPoolExecutor, shard: Shard, fd: int, sink: FileSink) -> None:
    """The CRC-32 of each tensor into the places that a zip file has for it, of the bytes as they were written."""

    def check(tensor: PlannedTensor) -> None:
        crc = 0
        for data in sink.written(tensor):
            crc = zlib.crc32(data, crc)
        for at in shard.checks[tensor.name]:
            write_all(fd, at, crc.to_bytes(4, "little"))

    list(workers.map(check, (tensor for tensor in shard.tensors if tensor.name in shard.checks)))
