"""Ranges: every method moves the same bytes, and every refusal falls back to the next method."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_convert.core.errors import InputError
from llava_convert.storage import ranges
from tests.reflink import MAKE, sharing

SIZE = 700_001  # not a multiple of anything
DATA = bytes(os.urandom(SIZE))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def move(
    source: Path, target: Path, src_off: int, dst_off: int, length: int, refused: ranges.Refused | None = None
) -> list[int]:
    """Copy one range into a target full of a filler, check every byte of it, and return the progress."""
    filler = b"\xa5" * (SIZE + 8192)
    target.write_bytes(filler)
    steps: list[int] = []
    src, dst = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        ranges.copy_range(src, src_off, dst, dst_off, length, progress=steps.append, refused=refused)
    finally:
        os.close(src)
        os.close(dst)
    expected = filler[:dst_off] + DATA[src_off : src_off + length] + filler[dst_off + length :]
    assert target.read_bytes() == expected
    assert sum(steps) == length
    return steps


def block(
    monkeypatch: pytest.MonkeyPatch, *, clone: bool = False, kernel: bool = False, positional: bool = False
) -> None:
    """Take methods away from `ranges`, as on a system that has none."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    if clone:
        monkeypatch.setattr(ranges, "_clone", refuse)
    if kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    if positional:
        for name in ("preadv", "pread", "pwrite"):
            monkeypatch.delattr(os, name, raising=False)


def fake_clone(src: int, src_off: int, length: int, dst: int, dst_off: int) -> None:
    """What FICLONERANGE does where it is supported, with the kernel's own check of the alignment."""
    if src_off % 4096 or dst_off % 4096 or length % 4096:
        raise OSError(errno.EINVAL, "unaligned")
    os.pwrite(dst, os.pread(src, length, src_off), dst_off)


@pytest.mark.parametrize("method", ["all", "clone", "kernel", "buffer", "lseek"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_method_moves_the_same_bytes(method: str, source: Path, tmp_path: Path, data: st.DataObject) -> None:
    src_off = data.draw(st.integers(0, SIZE))
    length = data.draw(st.integers(0, SIZE - src_off))
    congruent = data.draw(st.booleans())
    dst_off = src_off % 4096 + 4096 * data.draw(st.integers(0, 1)) if congruent else data.draw(st.integers(0, 8192))
    with pytest.MonkeyPatch.context() as patch:
        if method == "clone":
            patch.setattr(ranges, "_clone", fake_clone)
        else:
            block(patch, clone=method != "all", kernel=method in ("buffer", "lseek"), positional=method == "lseek")
        move(source, tmp_path / "target", src_off, dst_off, length)


def test_a_clone_takes_the_whole_blocks_and_the_buffer_the_ends(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def clone(src: int, src_off: int, length: int, dst: int, dst_off: int) -> None:
        asked.append((src_off, length))
        fake_clone(src, src_off, length, dst, dst_off)

    monkeypatch.setattr(ranges, "_clone", clone)
    steps = move(source, tmp_path / "target", 100, 100 + 4096, 200_000)
    assert asked == [(4096, 192_512)]  # from the first block's start to the last block's end
    assert steps == [4096 - 100, 192_512, 200_100 - 196_608]


def test_a_refused_clone_is_asked_for_once_per_pair_of_devices(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def clone(*_: int) -> None:
        asked.append(1)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(ranges, "_clone", clone)
    refused: ranges.Refused = set()
    for _ in range(3):
        move(source, tmp_path / "target", 0, 0, 300_000, refused)
    assert asked == [1]
    move(source, tmp_path / "target", 0, 0, 300_000, set())
    assert asked == [1, 1], "another conversion asks for itself"


@pytest.mark.parametrize("code", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EIO", "EPERM"])
def test_copy_file_range_failing_half_way_is_finished_through_the_buffer(
    code: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(monkeypatch, clone=True)
    calls: list[int] = []

    def partly(src: int, dst: int, count: int, src_off: int, dst_off: int) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(getattr(errno, code), code)
        return os.pwrite(dst, os.pread(src, 5000, src_off), dst_off)

    monkeypatch.setattr(os, "copy_file_range", partly, raising=False)
    steps = move(source, tmp_path / "target", 4096, 0, 400_000)
    if sys.platform == "linux":
        assert steps == [5000, 5000, 390_000]


def test_copy_file_range_that_returns_zero_is_not_believed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(monkeypatch, clone=True)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
    assert move(source, tmp_path / "target", 0, 4096, 400_000) == [400_000]


@pytest.mark.skipif(sys.platform != "linux", reason="copy_file_range is Linux's")
def test_a_full_disk_inside_copy_file_range_is_raised(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    block(monkeypatch, clone=True)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="full"):
        move(source, tmp_path / "target", 0, 0, 400_000)


def test_short_reads_and_writes_are_completed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, clone=True, kernel=True)
    read, write = ranges._read, ranges._write
    monkeypatch.setattr(ranges, "_read", lambda fd, view, offset: read(fd, view[:999], offset))
    monkeypatch.setattr(ranges, "_write", lambda fd, view, offset: write(fd, view[:777], offset))
    move(source, tmp_path / "target", 3, 5, 300_000)


@pytest.mark.parametrize(("clone", "kernel"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dst_off", [0, 1])
def test_a_source_that_ends_early_is_an_input_error(
    clone: bool, kernel: bool, dst_off: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(monkeypatch, clone=clone, kernel=kernel)
    src, dst = os.open(source, os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(InputError, match=r"shard 3 was truncated while reading: expected \d+ bytes at offset \d+"):
        ranges.copy_range(src, 0, dst, dst_off, SIZE + 1, progress=lambda _: None, where="shard 3")
    os.close(src)
    os.close(dst)


def test_read_into_fills_arrays_of_any_shape(source: Path) -> None:
    numpy = pytest.importorskip("numpy")
    fd = os.open(source, os.O_RDONLY)
    array = numpy.empty((3, 5), numpy.uint16)
    ranges.read_into(fd, 7, array)
    assert array.tobytes() == DATA[7:37]
    ranges.read_into(fd, SIZE, numpy.empty((0, 5), numpy.uint16))
    os.close(fd)


def test_write_all_writes_large_buffers_whole(tmp_path: Path) -> None:
    data = os.urandom(ranges.PIECE * 2 + 11)
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    ranges.write_all(fd, 13, data)
    os.close(fd)
    assert (tmp_path / "target").read_bytes() == bytes(13) + data


class FlaggedWrites:
    """`os.pwritev` as it is, or without the flag as before Linux 6.14; and what was written with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: int | None = None) -> None:
        self.places: list[tuple[int, int]] = []
        self._call, self._refuse = os.pwritev, refuse
        monkeypatch.setattr(os, "pwritev", self)

    def __call__(self, fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        if self._refuse is not None:
            raise OSError(self._refuse, os.strerror(self._refuse))
        self.places.append((offset, len(buffers[0])))
        return self._call(fd, buffers, offset, flags)


@pytest.mark.skipif(sys.platform != "linux", reason="RWF_DONTCACHE is Linux's")
@pytest.mark.parametrize("refuse", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("start", [0, 13, 4095])
def test_what_is_not_kept_is_written_whole(
    start: int, refuse: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any offset, several blocks that meet within pages, with the system's help and without."""
    flagged = FlaggedWrites(monkeypatch, refuse)
    data = os.urandom(ranges.PIECE + 3 * ranges.BLOCK + 11)
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    for at in range(0, len(data), 300_007):
        ranges.write_all(fd, start + at, data[at : at + 300_007], keep=False)
    ranges.write_all(fd, start + len(data), b"end", keep=False)
    os.close(fd)
    assert (tmp_path / "target").read_bytes() == bytes(start) + data + b"end"
    assert flagged.places or refuse is not None
    # A page that only a part of was written must not go: the system would read it again for the rest.
    assert all(at % ranges.BLOCK == length % ranges.BLOCK == 0 for at, length in flagged.places)


@pytest.mark.skipif(sys.platform != "linux", reason="RWF_DONTCACHE is Linux's")
def test_a_full_disk_is_told_where_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FlaggedWrites(monkeypatch, errno.ENOSPC)
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        ranges.write_all(fd, 0, bytes(ranges.BLOCK), keep=False)
    os.close(fd)


def pages_in_memory(file: Path) -> int:
    """How many bytes of a file the page cache holds, as `fincore` of util-linux says."""
    told = subprocess.run(["fincore", "-n", "-b", "-o", "RES", str(file)], check=True, capture_output=True, text=True)
    return int(told.stdout)


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore is of util-linux")
def test_what_is_not_kept_leaves_the_memory(tmp_path: Path) -> None:
    size, left = 64 << 20, {}
    for keep in (True, False):
        target = tmp_path / f"target{keep}"
        fd = os.open(target, os.O_RDWR | os.O_CREAT)
        try:
            os.pwritev(fd, [bytes(ranges.BLOCK)], 0, 0x80)
        except OSError:
            pytest.skip("this file system, or a kernel before 6.14, keeps every page")
        for at in range(13, size, ranges.BUFFER):
            ranges.write_all(fd, at, bytes(ranges.BUFFER), keep=keep)
        os.fsync(fd)
        os.close(fd)
        left[keep] = pages_in_memory(target)
    assert left[True] > size
    assert left[False] < size // 8  # a page where two writes meet stays, and what was on its way to the disk


def test_threads_share_descriptors(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for positional in (False, True):
        block(monkeypatch, clone=True, kernel=positional, positional=positional)
        target = tmp_path / f"target{positional}"
        with ranges.FilePool() as pool:
            src, dst = pool.open(source), os.open(target, os.O_RDWR | os.O_CREAT)
            starts = range(0, SIZE, 50_001)

            def copy(start: int, src: int = src, dst: int = dst) -> None:
                length = min(50_001, SIZE - start)
                ranges.copy_range(src, start, dst, start, length, progress=lambda _: None)

            with ThreadPoolExecutor(8) as threads:
                list(threads.map(copy, starts))
            os.close(dst)
        assert target.read_bytes() == DATA


def test_pool_opens_each_file_once_and_closes_all(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x")
    with ranges.FilePool() as pool:
        with ThreadPoolExecutor(8) as threads:
            fds = set(threads.map(lambda _: pool.open(source), range(64)))
        assert len(fds) == 1
        second = pool.open(other)
        assert {second}.isdisjoint(fds)
        if sys.platform != "win32":
            assert not os.get_inheritable(second)
    for fd in (second, *fds):
        with pytest.raises(OSError, match=r"[Bb]ad file descriptor"):
            os.fstat(fd)


def test_pool_refuses_what_is_no_file_and_does_not_hang(tmp_path: Path) -> None:
    with ranges.FilePool() as pool:
        with pytest.raises(InputError, match="cannot be opened: No such file"):
            pool.open(tmp_path / "absent")
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "fifo")
            with pytest.raises(InputError, match="is not a regular file"):
                pool.open(tmp_path / "fifo")
            with pytest.raises(InputError, match="is not a regular file"):
                pool.open(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="FICLONERANGE is Linux's")
@pytest.mark.parametrize("kind", MAKE)
def test_blocks_are_shared_on_a_reflink_file_system(kind: str, tmp_path: Path) -> None:
    with sharing(kind, tmp_path, 512 << 20) as mount:
        size = 64 << 20
        data = os.urandom(1 << 20) * 64
        (mount / "source").write_bytes(data)
        os.sync()
        free = shutil.disk_usage(mount).free
        src, dst = os.open(mount / "source", os.O_RDONLY), os.open(mount / "target", os.O_RDWR | os.O_CREAT)
        steps: list[int] = []
        refused: ranges.Refused = set()
        ranges.copy_range(src, 100, dst, 4196, size - 100, progress=steps.append, refused=refused)
        os.fsync(dst)
        os.close(src)
        os.close(dst)
        assert steps == [3996, size - 4096]  # one buffered end, then a clone of all whole blocks
        assert (mount / "target").read_bytes() == bytes(4196) + data[100:]
        assert free - shutil.disk_usage(mount).free < size // 8
        assert not any(method == "clone" for method, *_ in refused)
