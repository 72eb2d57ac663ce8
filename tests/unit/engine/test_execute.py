"""The executor: how work is cut, and that who does it changes no byte."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_convert.core.errors import InputError
from llava_convert.core.tensors import Extent, StoredTensor, nbytes_of
from llava_convert.engine import execute, sinks, tasks
from llava_convert.engine.compare import compare, merged_in_float32
from llava_convert.engine.plan import Plan, make_plan
from llava_convert.engine.run import Outcome, run_task
from llava_convert.engine.shards import PlannedTensor
from llava_convert.engine.sinks import FileSink
from llava_convert.engine.tasks import Copy, Work, tasks_of
from llava_convert.model.recipe import Recipe
from llava_convert.model.target import FileSet, Output, Target
from llava_convert.ops import kernels, steps
from llava_convert.ops.base import Op
from llava_convert.ops.cast import Cast, cast
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Quantize
from llava_convert.ops.rows import PadRows, RopePermute, constant
from llava_convert.storage import streams
from llava_convert.storage.output.staging import Staging
from llava_convert.storage.ranges import PIECE, FilePool
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.streams import BLOCK, blocks, cuts, rows_per_block
from tests.exact import merged, round_to


def stored(folder: Path, name: str, values: np.ndarray) -> StoredTensor:
    path = folder / name
    path.write_bytes(values.tobytes())
    return StoredTensor(name, "F32", values.shape, (Extent(path, 0, values.nbytes),))


def planned(source: StoredTensor, *ops: Op, shard: str = "") -> PlannedTensor:
    recipe = Recipe(source, ops)
    return PlannedTensor("w", "w", source, "checkpoint", ops, recipe.dtype, recipe.shape, 0, shard)


class Memory:
    """A sink that keeps what comes, by shard and tensor."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        self.found = {(t.shard, t.name): bytearray(t.nbytes) for t in tensors}

    def copy(self, task: Copy) -> None:
        raise AssertionError("no copies here")

    def put(self, tensor: PlannedTensor, start: int, data: np.ndarray) -> None:
        self.found[tensor.shard, tensor.name][start : start + data.nbytes] = data.tobytes()


def made_by(tensors: Sequence[PlannedTensor], *, whole: bool = True) -> dict[tuple[str, str], bytearray]:
    sink = Memory(tensors)
    with FilePool() as pool:
        for task in tasks_of(tensors, whole=whole):
            run_task(task, pool, sink, Outcome())
    return sink.found


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_blocks_are_of_one_size_but_for_the_last(tmp_path: Path, rows: int) -> None:
    values = np.arange(rows * 4096, dtype=np.float32).reshape(rows, 4096)
    source = stored(tmp_path, "w", values)
    with FilePool() as pool:
        found = [block.copy() for block in blocks(pool, source, 0, rows)]
    assert (np.concatenate(found) == values).all()
    assert [len(block) for block in found] == [64] * (rows // 64) + [rows % 64] * (rows % 64 > 0), "1 MiB"


def test_blocks_start_where_they_do_without_threads(tmp_path: Path) -> None:
    """A tensor of several shares is cut as if it were one."""
    rows = 5 * 4096 + 1
    source = replace(stored(tmp_path, "w", np.zeros((1, 4096), np.float32)), shape=(rows, 4096))
    step = rows_per_block(source)
    shares = [task for task in tasks_of([planned(source, Cast("F16"))]) if isinstance(task, Work)]
    assert len(shares) > 2
    assert [shares[0].first, shares[-1].last] == [0, rows]
    within = [cut for task in shares for cut in cuts(task.first, task.last, step)]
    assert within == list(cuts(0, rows, step))


@pytest.mark.parametrize("head", [(), (48,)], ids=["", "heads of 48"])
@pytest.mark.parametrize("rows", [96, 144, 1440])
def test_a_merge_is_the_exact_one_however_it_is_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, head: tuple[int, ...]
) -> None:
    """On one thread and on three, in one task and in many, among blocks of other sizes: the same bits, rounded once."""
    generator = np.random.default_rng(0)
    shapes = ((rows, 1200), (64, 1200), (rows, 64))
    base, a, b = ((generator.standard_normal(shape) * 0.02).astype(np.float32) for shape in shapes)
    op = MergeLora(stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.25)
    tensor = planned(stored(tmp_path, "w", base), op, *(RopePermute(rows // size) for size in head), Cast("F16"))
    order = np.arange(rows).reshape(-1, 2, 24).swapaxes(1, 2).reshape(-1) if head else np.arange(rows)
    exact = merged(base[order[:3]], a, b[order[:3]], 0.25)
    wanted = np.array([round_to(value, "F16") for value in exact.flat], np.uint16).tobytes()
    found = []
    monkeypatch.setattr(tasks, "SHARE", 1 << 19)
    for threads, whole in ((1, True), (1, False), (3, False)):
        sink = Memory([tensor])
        with FilePool() as pool, ThreadPoolExecutor(threads) as workers:
            cut = tasks_of([tensor], whole=whole)
            assert whole or len(cut) > (1 if rows > 1000 else 0)
            execute.run_all(workers, cut, pool, sink, Outcome())
        found.append(bytes(sink.found["", "w"]))
    assert found[0] == found[1] == found[2]
    assert found[0].startswith(wanted)


def test_writeback_starts_with_every_full_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(sinks, "start_writeback", lambda fd, offset, length: started.append((offset, length)))
    source = stored(tmp_path, "w", np.zeros((1, 4), np.float32))
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        with FilePool() as pool:
            sink = FileSink(pool, {"": out}, lambda done: None)
            tensor = replace(planned(source), offset=96)
            for start in range(0, 2 * PIECE, PIECE // 4):
                sink.put(tensor, start, np.zeros(PIECE // 4, np.uint8))
    finally:
        os.close(out)
    assert started == [(0, PIECE), (PIECE, PIECE)]


def test_an_error_stops_the_tasks_that_run(tmp_path: Path) -> None:
    """Not only those that wait: one task may take half a minute."""
    values = np.ones((6400, 1024), np.float32)
    good = planned(stored(tmp_path, "good", values), Cast("F16"))
    bad = replace(planned(stored(tmp_path, "bad", values), Cast("F16")), name="bad")
    going = threading.Event()
    blocks_put: list[int] = []

    class Sink:
        def copy(self, task: object) -> None: ...

        def put(self, tensor: PlannedTensor, start: int, data: object) -> None:
            if tensor.name == "bad":
                assert going.wait(10)
                raise OSError("disk full")
            blocks_put.append(start)
            going.set()
            time.sleep(0.05)

    with FilePool() as pool, ThreadPoolExecutor(2) as workers, pytest.raises(OSError, match="disk full"):
        execute.run_all(workers, tasks_of([good, bad], whole=True), pool, Sink(), Outcome())
    assert 1 <= len(blocks_put) < 50  # of 100


# --- rows that stay together


@pytest.mark.parametrize(("rows", "together"), [(4096, 128), (960, 96), (640, 640), (192, 8), (40, 4)])
def test_heads_are_never_parted(tmp_path: Path, rows: int, together: int) -> None:
    values = np.arange(rows * 1024, dtype=np.float32).reshape(rows, 1024)
    source = stored(tmp_path, "w", values)
    step = rows_per_block(source, together)
    assert step % together == 0
    with FilePool() as pool:
        found = [block.copy() for block in blocks(pool, source, 0, rows, together)]
    assert all(len(block) % together == 0 for block in found)
    assert (np.concatenate(found) == values).all()


def test_shares_begin_with_a_head(tmp_path: Path) -> None:
    rows = 96 * 700
    source = replace(stored(tmp_path, "w", np.zeros((1, 4096), np.float32)), shape=(rows, 4096))
    shares = tasks_of([planned(source, RopePermute(700), Quantize("Q8_0"))])
    assert len(shares) > 10 and all(isinstance(task, Work) and task.together == 96 for task in shares)
    assert all(task.first % 96 == 0 for task in shares if isinstance(task, Work))


@pytest.mark.parametrize("strided", [False, True])
def test_rotary_order_in_blocks_equals_the_formula(tmp_path: Path, strided: bool) -> None:
    values = np.random.default_rng(0).standard_normal((1920, 256)).astype(np.float32)
    source = stored(tmp_path, "w", np.ascontiguousarray(values.T) if strided else values)
    if strided:
        source = replace(source, shape=(1920, 256), strides=(1, 1920))
    (found,) = made_by([planned(source, RopePermute(20), Quantize("Q4_K"))], whole=False).values()
    order = values.reshape(20, 2, 48, 256).swapaxes(1, 2).reshape(1920, 256)
    assert found == kernels.quantize("Q4_K", np.ascontiguousarray(order)).tobytes()


# --- several outputs of one source


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that were read of each file."""
    found: dict[str, int] = {}
    original = FilePool.read_into

    def counted(pool: FilePool, path: Path, offset: int, buffer: memoryview, *, until: int = 0) -> None:
        found[path.name] = found.get(path.name, 0) + len(buffer)
        original(pool, path, offset, buffer, until=until)

    monkeypatch.setattr(FilePool, "read_into", counted)
    return found


def of_each_type(source: StoredTensor, *ops: Op) -> list[PlannedTensor]:
    tails: list[tuple[Op, ...]] = [(), (Cast("F16"),), (Quantize("Q8_0"),), (Quantize("Q6_K"),)]
    return [planned(source, *ops, *tail, shard=str(i)) for i, tail in enumerate(tails)]


@pytest.mark.parametrize("whole", [False, True])
def test_a_source_is_read_once_for_all_types(tmp_path: Path, reads: dict[str, int], whole: bool) -> None:
    """Also where one of them is a bare copy; and each gets the bytes that it gets alone."""
    values = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
    source = stored(tmp_path, "w", values)
    tensors = of_each_type(source)
    found = made_by(tensors, whole=whole)
    assert reads == {"w": values.nbytes}
    assert found["0", "w"] == values.tobytes()
    assert found["1", "w"] == values.astype(np.float16).tobytes()
    for shard, dtype in (("2", "Q8_0"), ("3", "Q6_K")):
        assert found[shard, "w"] == kernels.quantize(dtype, values).tobytes()


def test_what_they_have_in_common_is_done_once(
    tmp_path: Path, reads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    # Few bits, so that sums are exact in float32 too.
    shapes = ((512, 768), (512, 16), (16, 768))
    base, b, a = (generator.integers(-64, 64, shape).astype(np.float32) / 1024 for shape in shapes)
    op = MergeLora(stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.25)
    merges = []
    original = MergeLora.stream

    def counted(self: MergeLora, *args: object) -> Iterator[np.ndarray]:
        merges.append(self)
        return original(self, *args)

    monkeypatch.setattr(MergeLora, "stream", counted)
    tensors = of_each_type(stored(tmp_path, "w", base), op, RopePermute(8), Cast("F32"))
    found = made_by(tensors, whole=False)
    assert len(merges) == 1 and reads["a"] == a.nbytes and reads["w"] == base.nbytes
    wanted = (base + (b @ a) * np.float32(0.25)).reshape(8, 2, 32, 768).swapaxes(1, 2).reshape(512, 768)
    assert found["0", "w"] == wanted.tobytes()
    assert found["3", "w"] == kernels.quantize("Q6_K", np.ascontiguousarray(wanted)).tobytes()


def test_ops_that_add_rows_share_a_stream_only_when_they_are_the_same(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((300, 256)).astype(np.float32)
    source = stored(tmp_path, "w", values)
    tensors = [
        planned(source, PadRows(320), Quantize("Q8_0"), shard="padded q8_0"),
        planned(source, PadRows(320), Cast("F16"), shard="padded f16"),
        planned(source, PadRows(310), Cast("F16"), shard="padded less"),
        planned(source, Cast("F16"), shard="f16"),
        planned(source, shard="copy"),
    ]
    assert [len(task.tensors) for task in tasks_of(tensors) if isinstance(task, Work)] == [2, 1, 2]
    found = {shard: bytes(data) for (shard, _), data in made_by(tensors).items()}
    mean = values.mean(0, dtype=np.float64).astype(np.float32)
    padded = np.concatenate([values, np.broadcast_to(mean, (20, 256))])
    assert found == {
        "padded q8_0": kernels.quantize("Q8_0", padded).tobytes(),
        "padded f16": padded.astype(np.float16).tobytes(),
        "padded less": padded[:310].astype(np.float16).tobytes(),
        "f16": values.astype(np.float16).tobytes(),
        "copy": values.tobytes(),
    }


def test_constants_need_no_file() -> None:
    source, ops = constant("rope_freqs.weight", (4,), (1.0, 2.0, 4.0, 8.0))
    found = made_by([planned(source, *ops, shard="f32"), planned(source, *ops, Cast("F16"), shard="f16")])
    assert found["f32", "w"] == np.array([1, 2, 4, 8], np.float32).tobytes()
    assert found["f16", "w"] == np.array([1, 2, 4, 8], np.float16).tobytes()


def test_losses_and_digests_are_of_each_output(tmp_path: Path) -> None:
    xxhash = pytest.importorskip("xxhash")
    values = np.ones((64, 256), np.float32)
    values[3, 5] = 1e-12
    source = stored(tmp_path, "w", values)
    tensors = [planned(source, Cast("F16"), shard="a"), planned(source, Quantize("Q8_0"), shard="b")]
    outcome, sink = Outcome(), Memory(tensors)
    with FilePool() as pool:
        for task in tasks_of(tensors, whole=True):
            run_task(task, pool, sink, outcome, digest=True)
    assert outcome.digests == {key: xxhash.xxh3_128(bytes(data)).hexdigest() for key, data in sink.found.items()}
    assert outcome.flushed == 1 and not outcome.nonfinite


def test_a_value_that_no_block_holds_is_named(tmp_path: Path) -> None:
    values = np.ones((64, 256), np.float32)
    values[9, 9] = np.nan
    with pytest.raises(InputError, match=r"w: 1 of .* NaN or infinite"):
        made_by([planned(stored(tmp_path, "w", values), Quantize("Q8_0"))])


@pytest.mark.parametrize("tails", [[Cast("F32")], [Cast("F32"), Quantize("Q6_K"), Quantize("Q8_0")]], ids=len)
def test_few_blocks_are_held_at_a_time(tmp_path: Path, tails: list[Op]) -> None:
    """Of 54 blocks (two MiB each as float32), no more than a handful are there together."""
    source = replace(stored(tmp_path, "w", np.zeros((7000, 1024), np.float32)), dtype="F16", shape=(14000, 1024))
    tensors = [planned(source, tail, shard=str(i)) for i, tail in enumerate(tails)]
    (task,) = tasks_of(tensors, whole=True)

    class Sink:
        def copy(self, task: object) -> None: ...

        def put(self, tensor: PlannedTensor, start: int, data: object) -> None: ...

    for dtype in ("Q6_K", "Q8_0"):  # which are compiled once
        kernels.quantize(dtype, np.zeros((1, 256), np.float32))
    tracemalloc.start()
    try:
        with FilePool() as pool:
            run_task(task, pool, Sink(), Outcome())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2 * BLOCK


# --- a batch of files


def two_types(folder: Path, sources: Mapping[str, np.ndarray]) -> Plan:
    """The same tensors as float16 and as float32, in two file sets."""
    tensors = {name: stored(folder, name, values) for name, values in sources.items()}
    sets = tuple(
        FileSet(tuple(Output(n, n, Recipe(t), dtype) for n, t in tensors.items()), folder=dtype, limit=limit)
        for dtype, limit in (("F16", None), ("F32", 620_000))
    )
    return make_plan(Target("x", sets, {}))


def run(plan: Plan, out: Path, *, resume: bool = False) -> list[str]:
    """Execute; returns what the staging said."""
    said: list[str] = []
    stage = Staging(out, plan.hash, force=True, resume=resume, needed_bytes=0, say=said.append)
    with stage, FilePool() as pool:
        execute.execute(plan, stage, pool, threads=2, progress=lambda done: None)
        stage.commit()
    return said


def test_what_is_copied_is_written_first(tmp_path: Path) -> None:
    """While it is, NumPy is imported for the rest."""
    tensors = [stored(tmp_path, name, np.full((8, 8), i, np.float32)) for i, name in enumerate("abc")]
    outputs = [
        Output(t.name, t.name, Recipe(t), dtype) for t, dtype in zip(tensors, ("F16", "F32", "F32"), strict=True)
    ]
    plan = make_plan(Target("x", tuple(FileSet((one,), stem=one.name) for one in outputs), {}))
    order: list[str] = []
    stage = Staging(tmp_path / "out", plan.hash, force=False, resume=False, needed_bytes=0, say=order.append)
    with stage, FilePool() as pool:
        execute.execute(plan, stage, pool, progress=lambda done: None, on_file=order.append)
        stage.commit()
    assert order == ["b.safetensors", "c.safetensors", "a.safetensors"]


def test_files_of_several_types_are_written_in_one_pass(tmp_path: Path, reads: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    sources = {name: generator.standard_normal((300, 256)).astype(np.float32) for name in ("a", "b", "c")}
    plan = two_types(tmp_path, sources)
    assert [[shard.name for shard in batch] for batch in plan.batches] == [
        [
            "F16/model.safetensors",
            "F32/model-00001-of-00002.safetensors",
            "F32/model-00002-of-00002.safetensors",
        ]
    ]
    run(plan, tmp_path / "out")
    assert reads == {name: values.nbytes for name, values in sources.items()}
    found = {shard.name: read_header(tmp_path / "out" / shard.name).tensors for shard in plan.shards}
    with FilePool() as pool:
        for tensors in found.values():
            for name, tensor in tensors.items():
                wanted = sources[name].astype(np.float16 if tensor.dtype == "F16" else np.float32)
                assert streams.read_whole(pool, tensor).tobytes() == wanted.tobytes()


def test_a_resumed_batch_writes_only_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three files of a batch are done when the run dies: the third alone is written by the next."""
    sources = {name: np.full((300, 256), 0.5, np.float32) for name in ("a", "b", "c")}
    plan = two_types(tmp_path, sources)
    done = [shard.name for shard in plan.shards[:2]]
    monkeypatch.setattr(Staging, "finished", lambda self, name: name in done)
    out = tmp_path / "out"
    run(plan, out)
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.safetensors")) == [plan.shards[2].name]


# --- comparing


def test_quantised_tensors_are_compared(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((200, 512)).astype(np.float32)
    source = stored(tmp_path, "w", values)
    made = kernels.quantize("Q4_K", values)
    made[7, 40] ^= 0x0F
    (tmp_path / "made").write_bytes(made.tobytes())
    theirs = StoredTensor("w", "Q4_K", (200, 512), (Extent(tmp_path / "made", 0, nbytes_of("Q4_K", values.size)),))
    gap = np.abs(kernels.dequantize("Q4_K", made) - kernels.dequantize("Q4_K", kernels.quantize("Q4_K", values)))
    with FilePool() as pool:
        for planned_as in (planned(source, Quantize("Q4_K")), planned(theirs)):
            found = compare([planned_as], {"w": theirs}, pool, progress=lambda done: None).differences
            if planned_as.source is theirs:
                assert found == {}
            else:
                assert found["w"].elements == np.count_nonzero(gap) == 1
                assert found["w"].largest == pytest.approx(float(gap.max()))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_merge_in_float32_is_told_from_another_merge(tmp_path: Path, dtype: str) -> None:
    """Whatever reorders its rows afterwards; of several tensors those that differ by more are named."""
    generator = np.random.default_rng(0)
    shapes = ((256, 192), (32, 192), (256, 32))
    base, a, b = ((generator.standard_normal(shape) * 0.1).astype(np.float32) for shape in shapes)
    base[3, 4] = np.nan
    op = MergeLora(stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.5)
    source = stored(tmp_path, "w", base)
    others = {
        "as float32 does": base + (b @ a) * np.float32(0.5),
        "alpha doubled": base + b @ a,
        "without a rank": base + (b[:, 1:] @ a[1:]) * np.float32(0.5),
        "one row another": base + (b @ a) * np.float32(0.5) * (np.arange(256) != 200)[:, None],
        "one value another": base + (b @ a) * np.float32(0.5) + 0.01 * (np.arange(256) == 200)[:, None],
        "finite": np.nan_to_num(base + (b @ a) * np.float32(0.5)),
    }
    tensors, theirs = [], {}
    for name, values in others.items():
        made = cast(values[rope_order(256, 4)], "F32", dtype)
        theirs[name] = replace(stored(tmp_path, name, made), dtype=dtype)
        tensors.append(replace(planned(source, op, RopePermute(4), *steps("F64", dtype)), name=name))
    with FilePool() as pool:
        differing = set(compare(tensors, theirs, pool, progress=lambda done: None).differences)
        assert differing >= set(others) - {"as float32 does"}
        assert merged_in_float32(tensors, theirs, pool) == {"as float32 does"}


def rope_order(rows: int, heads: int) -> np.ndarray:
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
