"""The executor: how work is cut, and that who does it changes no byte."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_convert import execute
from llava_convert.execute import FileSink, Outcome, Work, run_task, tasks_of
from llava_convert.ops import Cast, MergeLora
from llava_convert.plan import PlannedTensor
from llava_convert.spec import Extent, StoredTensor
from llava_convert.storage.ranges import PIECE, FilePool
from llava_convert.storage.streams import LEAST_ROWS, blocks, cuts, rows_per_block


def stored(folder: Path, name: str, values: np.ndarray) -> StoredTensor:
    path = folder / name
    path.write_bytes(values.tobytes())
    return StoredTensor(name, "F32", values.shape, (Extent(path, 0, values.nbytes),))


def planned(source: StoredTensor, *ops: MergeLora | Cast) -> PlannedTensor:
    dtype = ops[-1].dtype if ops and isinstance(ops[-1], Cast) else source.dtype
    return PlannedTensor("w", "w", source, "checkpoint", ops, dtype, source.shape, 0)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 191, 192, 1000, 4096])
def test_no_block_of_a_matrix_falls_below_the_least_rows(tmp_path: Path, rows: int) -> None:
    """One to three rows alone are multiplied in another order of sums than within the whole product."""
    values = np.arange(rows * 4096, dtype=np.float32).reshape(rows, 4096)
    source = stored(tmp_path, "w", values)
    with FilePool() as pool:
        found = [block.copy() for block in blocks(pool, source, 0, rows)]
    assert (np.concatenate(found) == values).all()
    assert all(len(block) >= min(LEAST_ROWS, rows) for block in found)
    assert max(map(len, found)) < 2 * LEAST_ROWS


def test_blocks_start_where_they_do_without_threads(tmp_path: Path) -> None:
    """A tensor of several shares is cut as if it were one."""
    rows = 5 * 4096 + 1
    source = replace(stored(tmp_path, "w", np.zeros((1, 4096), np.float32)), shape=(rows, 4096))
    step = rows_per_block(source)
    shares = [task for task in tasks_of([planned(source, Cast("F16"))]) if isinstance(task, Work)]
    assert len(shares) > 2
    assert [shares[0].first, shares[-1].last] == [0, rows]
    within = [cut for task in shares for cut in cuts(source, task.first, task.last, step)]
    assert within == list(cuts(source, 0, rows, step))


@pytest.mark.parametrize("rows", [65, 129, 200])
def test_merge_by_blocks_equals_the_whole_product(tmp_path: Path, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, b, a = (torch.randn(shape, generator=generator) * 0.02 for shape in ((rows, 4096), (rows, 64), (64, 4096)))
    wanted = (base + (b @ a) * 0.25).half()
    op = MergeLora(stored(tmp_path, "a", a.numpy()), stored(tmp_path, "b", b.numpy()), 0.25)
    tensor = planned(stored(tmp_path, "w", base.numpy()), op, Cast("F16"))
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        with FilePool() as pool:
            for task in tasks_of([tensor]):
                run_task(task, pool, FileSink(pool, out, lambda done: None), Outcome())
        found = torch.frombuffer(bytearray(os.pread(out, wanted.nbytes, 0)), dtype=torch.float16)
    finally:
        os.close(out)
    assert torch.equal(found.reshape(wanted.shape).view(torch.int16), wanted.view(torch.int16))


def test_writeback_starts_with_every_full_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(execute, "start_writeback", lambda fd, offset, length: started.append((offset, length)))
    source = stored(tmp_path, "w", np.zeros((1, 4), np.float32))
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        with FilePool() as pool:
            sink = FileSink(pool, out, lambda done: None)
            tensor = replace(planned(source), offset=96)
            for start in range(0, 2 * PIECE, PIECE // 4):
                sink.put(tensor, start, np.zeros(PIECE // 4, np.uint8))
    finally:
        os.close(out)
    assert started == [(0, PIECE), (PIECE, PIECE)]


def test_arithmetic_waits_for_torch_and_copies_do_not(tmp_path: Path) -> None:
    values = np.full((64, 64), 0.5, np.float32)
    copied = planned(stored(tmp_path, "copied", values))
    worked = replace(planned(stored(tmp_path, "worked", values), Cast("F16")), name="v", offset=values.nbytes)
    order: list[str] = []
    arrived = threading.Event()

    class Sink:
        def copy(self, task: object) -> None:
            order.append("copy")
            arrived.set()

        def put(self, tensor: PlannedTensor, start: int, data: object) -> None:
            order.append("put")

    def ready() -> None:
        assert arrived.wait(10)
        order.append("torch")

    with FilePool() as pool, ThreadPoolExecutor(2) as workers:
        execute.run_all(workers, tasks_of([worked, copied]), pool, Sink(), Outcome(), ready)
    assert order == ["copy", "torch", "put"]
