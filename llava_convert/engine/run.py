"""One task done: a source streamed once, in blocks, through the ops of every tensor that is made of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, field
from typing import Any

from llava_convert.core.arrays import Array, raw
from llava_convert.core.errors import MismatchError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.engine.shards import PlannedTensor
from llava_convert.engine.sinks import Sink
from llava_convert.engine.tasks import Assembly, Copy, Task, Work
from llava_convert.ops.base import Blocks, CastLoss, Context, Op
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import BLOCK, blocks, cuts, read_bytes, read_whole, rows_of


@dataclass(slots=True)
class Outcome:
    """What a run found: cast losses and content digests, each by shard and tensor."""

    losses: dict[tuple[str, str], CastLoss] = field(default_factory=dict)
    digests: dict[tuple[str, str], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def lose(self, tensor: PlannedTensor, loss: CastLoss) -> None:
        with self._lock:
            self.losses.setdefault((tensor.shard, tensor.name), CastLoss()).add(loss)

    def of(self, shard: str) -> dict[str, Any]:
        """What was found about one shard, as JSON has it; `take` takes it back."""
        losses = {
            name: astuple(loss) for (one, name), loss in self.losses.items() if one == shard and any(astuple(loss))
        }
        digests = {name: digest for (one, name), digest in self.digests.items() if one == shard}
        return {key: value for key, value in (("losses", losses), ("digests", digests)) if value}

    def take(self, shard: str, found: Mapping[str, Any]) -> None:
        """What an earlier run found about a shard. Raises ValueError and TypeError for what `of` does not give."""
        losses = {(shard, str(name)): CastLoss(*map(int, loss)) for name, loss in found.get("losses", {}).items()}
        digests = {(shard, str(name)): str(digest) for name, digest in found.get("digests", {}).items()}
        with self._lock:
            self.losses |= losses
            self.digests |= digests

    @property
    def flushed(self) -> int:
        return sum(loss.flushed for loss in self.losses.values())

    @property
    def nonfinite(self) -> dict[str, int]:
        """By tensor; what several shards hold of one counts once."""
        found: dict[str, int] = {}
        for (_, name), loss in self.losses.items():
            if loss.nonfinite:
                found[name] = max(found.get(name, 0), loss.nonfinite)
        return found

    def refuse_overflow(self) -> None:
        """Raise MismatchError (exit 7) when a cast made a finite value infinite."""
        bad = {name: loss.overflowed for (_, name), loss in self.losses.items() if loss.overflowed > 0}
        if bad:
            name = min(bad)
            more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
            raise MismatchError(
                f"{printable(name)}: {bad[name]} finite values do not fit the output's dtype{more}",
                hint="use --dtype bfloat16, which has the range of float32; for GGUF --outtype, --mmproj-outtype bf16",
            )


def run_task(
    task: Task,
    pool: FilePool,
    sink: Sink,
    outcome: Outcome,
    *,
    digest: bool = False,
    stopped: threading.Event | None = None,
) -> None:
    """Do one task, or leave it once `stopped` is set: quantising a whole embedding takes half a minute.

    Raises what reading and writing raise, and InputError and UnsupportedError from ops.
    """
    if isinstance(task, Copy):
        if stopped is None or not stopped.is_set():
            sink.copy(task)
        return
    if isinstance(task, Assembly):
        for work in task.work:
            run_task(work, pool, sink, outcome, stopped=stopped)
        if digest and not (stopped is not None and stopped.is_set()):
            hasher = _hasher()
            for written in sink.written(task.tensor):
                hasher.update(written)
            outcome.digests[task.tensor.shard, task.tensor.name] = hasher.hexdigest()
        return
    losses = [CastLoss() for _ in task.tensors]
    hashers = [_hasher() for _ in task.tensors] if digest else []
    places = [t.nbytes // max(1, rows_of(t.shape)) * task.first for t in task.tensors]
    for made in _streams(task, pool, losses):
        if stopped is not None and stopped.is_set():
            return
        for i, (tensor, block) in enumerate(zip(task.tensors, made, strict=True)):
            data = block if block.flags.c_contiguous else block.copy()
            if hashers:
                hashers[i].update(raw(data))
            flat, done = data.reshape(-1).view(np.uint8), 0
            for at, length in tensor.spans(places[i], data.nbytes):
                sink.put(tensor, at, flat[done : done + length] if tensor.place is not None else data)
                done += length
            places[i] += data.nbytes
    for tensor, hasher in zip(task.tensors, hashers, strict=False):
        outcome.digests[tensor.shard, tensor.name] = hasher.hexdigest()
    for tensor, loss in zip(task.tensors, losses, strict=True):
        if tensor.ops:
            outcome.lose(tensor, loss)


def _hasher() -> Any:
    import xxhash

    return xxhash.xxh3_128()


def _streams(task: Work, pool: FilePool, losses: Sequence[CastLoss]) -> Iterator[tuple[Array, ...]]:
    """One block for each tensor of the task, again and again; each is gone when the next are asked for.

    What the tensors have in common is done once. Their further ops give a block for each block, so that all of them
    can follow one buffer in step.
    """
    tensors, source = task.tensors, task.tensors[0].source
    if all(tensor.is_copy for tensor in tensors):
        row = source.nbytes // max(1, rows_of(source.shape))
        yield from ((block,) * len(tensors) for block in _raw(pool, source, task.first * row, task.last * row))
        return
    common = 0
    for ops in zip(*(tensor.ops for tensor in tensors), strict=False):
        if len(set(ops)) > 1:
            break
        common += 1

    def context(loss: CastLoss, name: str) -> Context:
        return Context(lambda stored: read_whole(pool, stored), loss, task.first, printable(name))

    shared = CastLoss()
    stream = blocks(pool, source, task.first, task.last, task.together)
    trunk = tensors[0].ops[:common]
    stream, dtype, shape = _through(trunk, stream, source.dtype, source.shape or (1,), context(shared, tensors[0].name))
    current: list[Array] = []

    def follow() -> Blocks:  # itertools.tee would keep up to 57 blocks
        while True:
            yield current[0]

    branches = [
        _through(tensor.ops[common:], follow(), dtype, shape, context(loss, tensor.name))[0]
        for tensor, loss in zip(tensors, losses, strict=True)
    ]
    for block in stream:
        current[:] = [block]
        yield tuple(map(next, branches))
    for loss in losses:
        loss.add(shared)


def _through(
    ops: Sequence[Op], stream: Blocks, dtype: str, shape: tuple[int, ...], context: Context
) -> tuple[Blocks, str, tuple[int, ...]]:
    for op in ops:
        stream = op.stream(stream, dtype, shape, context)
        dtype, shape = op.result(dtype, shape)
    return stream, dtype, shape


def _raw(pool: FilePool, source: StoredTensor, first: int, last: int) -> Iterator[Array]:
    """Bytes `first` to `last` of a tensor, unparsed: any dtype, block by block, and whole blocks of a quantised one."""
    size = BLOCK // QUANTS[source.dtype][1] * QUANTS[source.dtype][1] if source.dtype in QUANTS else BLOCK
    buffer = bytearray(size)
    for start, end in cuts(first, last, size):
        view = memoryview(buffer)[: end - start]
        read_bytes(pool, source, start, view, until=last)
        yield np.frombuffer(view, np.uint8)
