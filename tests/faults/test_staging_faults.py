"""An output is whole, absent, or still the old one. Tests carry the number of their row in the list of faults."""

from __future__ import annotations

import errno
import inspect
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import Interrupted, OutputError, UsageError
from llava_convert.storage.output import finished, locks, staging
from llava_convert.storage.output.staging import Staging, Terminated, interrupt_on_sigterm
from llava_convert.storage.ranges import write_all

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, limits or permissions")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's mount or renameat2")

SHARDS = {"a.safetensors": b"A" * 3000, "sub/b.safetensors": b"B" * 5000}
SMALL = {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {}}'}
NEW = {**SHARDS, **SMALL}
OLD = {"old.txt": b"the old output"}


def stage(out: Path, plan: str = "plan", **options: Any) -> Staging:
    settings = {"force": False, "resume": False, "needed_bytes": 0, "say": lambda line: None} | options
    return Staging(out, plan, **settings)


def fill(staged: Staging) -> None:
    for name, data in SHARDS.items():
        if not staged.finished(name):
            with staged.new_file(name, len(data)) as fd:
                for at in range(0, len(data), 1000):
                    write_all(fd, at, data[at : at + 1000])
    for name, data in SMALL.items():
        staged.write_bytes(name, data)


def build(out: Path, **options: Any) -> None:
    with stage(out, **options) as staged:
        fill(staged)
        staged.commit()


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if not p.is_dir()}


def make_old(out: Path, kind: str = "full folder") -> None:
    if kind == "file":
        out.write_bytes(b"the old output")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    elif kind == "link":
        target = out.with_name("target")
        target.mkdir()
        (target / "old.txt").write_bytes(OLD["old.txt"])
        out.symlink_to(target.name)
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "old.txt").write_bytes(OLD["old.txt"])


def snapshot(parent: Path) -> dict[str, Any]:
    return {
        p.name: str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else tree(p)
        for p in parent.iterdir()
    }


KINDS = ["file", "empty folder", "full folder", "link", "broken link"]


# Row 34: the output and a source are one


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("how", ["same", "in", "holds", "link to", "through a link", "holds a link", "dots", "staging"])
def test_row_34_output_and_source_overlap(how: str, force: bool, tmp_path: Path) -> None:
    source = tmp_path / "outer" / "model"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"w")
    out, read = source, source
    if how == "in":
        out = source / "a" / "b"
    elif how == "holds":
        out = source.parent
    elif how == "link to":
        out = tmp_path / "link"
        out.symlink_to(source)
    elif how == "through a link":
        (tmp_path / "link").symlink_to(tmp_path / "outer")
        out = tmp_path / "link" / "model" / "new"
    elif how == "holds a link":
        out = tmp_path / "other"
        out.mkdir()
        read = out / "alias"
        read.symlink_to(source / "weights")
    elif how == "dots":
        (tmp_path / "x").mkdir()
        out = tmp_path / "x" / ".." / "outer" / "model"
    elif how == "staging":
        read = tmp_path / ".new.partial"
        read.mkdir()
        out = tmp_path / "new"
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="source"), stage(out, reads=[read], force=force, resume=True):
        pass
    assert snapshot(tmp_path) == before


def test_row_34_the_same_file_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"w")
    os.link(tmp_path / "source", tmp_path / "out")
    with pytest.raises(UsageError), stage(tmp_path / "out", reads=[tmp_path / "source"], kind="file", force=True):
        pass


def test_row_34_a_neighbour_of_the_source_is_fine(tmp_path: Path) -> None:
    (tmp_path / "iter_1.pth").write_bytes(b"w")
    build(tmp_path / "iter_1", reads=[tmp_path / "iter_1.pth"])
    assert tree(tmp_path / "iter_1") == NEW


def test_row_34_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "here")
    with pytest.raises(UsageError, match="current folder"), stage(tmp_path / "out", force=True):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/..", "x\0y"])
def test_row_33_names_that_are_no_output(name: str) -> None:
    with pytest.raises(UsageError):
        stage(Path(name), force=True)


@pytest.mark.parametrize("name", ["with space", "ünï", "new\nline", "slash/", "deep/er/out"])
def test_row_33_odd_names_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(Path(name))
    assert tree(tmp_path / name) == NEW


# Row 65: the target exists


@pytest.mark.parametrize("kind", KINDS)
def test_row_65_existing_output_is_refused(kind: str, tmp_path: Path) -> None:
    make_old(tmp_path / "out", kind)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="out exists") as caught, stage(tmp_path / "out"):
        pass
    assert "--force" in str(caught.value.hint)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_row_65_force_replaces_it_and_no_link_target(
    kind: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        no_exchange(monkeypatch)
    make_old(tmp_path / "out", kind)
    build(tmp_path / "out", force=True)
    rest = {"target": OLD} if kind == "link" else {}
    assert not (tmp_path / "out").is_symlink()
    assert snapshot(tmp_path) == {"out": NEW, **rest}


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system or file system without RENAME_EXCHANGE and RENAME_NOREPLACE."""

    def plain(new: Path, out: Path, *, exchange: bool) -> bool:
        if not exchange:
            new.rename(out)
        return not exchange

    monkeypatch.setattr(staging, "_rename", plain)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "absent"])
@pytest.mark.parametrize("point", ["body", "rename", "sync"])
def test_row_65_force_keeps_the_old_one_through_any_failure(
    kind: str, exchange: bool, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if kind != "absent":
        make_old(out, kind)
    before = snapshot(tmp_path)
    if not exchange:
        no_exchange(monkeypatch)
    error: type[Exception] = OutputError
    if point == "rename":
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name == ".out.partial":
                raise OSError(errno.EIO, "broken disk")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        if exchange:
            monkeypatch.setattr(staging, "_rename", lambda *_, **__: fail(tmp_path / ".out.partial", out))
    elif point == "sync":
        sync = staging._sync

        def broken(path: Path) -> None:
            if path == tmp_path:
                raise OSError(errno.EIO, "broken disk")
            sync(path)

        monkeypatch.setattr(staging, "_sync", broken)
    else:
        error = ZeroDivisionError
    with pytest.raises(error), stage(out, force=True) as staged:
        fill(staged)
        if point == "body":
            raise ZeroDivisionError
        staged.commit()
    assert snapshot(tmp_path) == before


def test_row_65_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"), stage(tmp_path / "out") as staged:
        fill(staged)
        (tmp_path / "out").mkdir()
        staged.commit()
    assert snapshot(tmp_path) == {"out": {}}


@linux
def test_row_65_a_rename_never_replaces_what_appeared_at_the_last_moment(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        staging._rename(tmp_path / "new", tmp_path / "out", exchange=False)


def test_row_65_a_file_of_the_users_called_old_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.old").write_bytes(b"mine")
    build(tmp_path / "out")
    no_exchange(monkeypatch)
    with pytest.raises(OutputError, match="in the way"):
        build(tmp_path / "out", force=True)
    assert snapshot(tmp_path) == {".out.old": b"mine", "out": NEW}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "absent"])
def test_row_65_single_file_outputs(kind: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        no_exchange(monkeypatch)
    out = tmp_path / "out"
    if kind != "absent":
        make_old(out, kind)
    with stage(out, force=True, kind="file") as staged:
        with staged.new_file("out", 5) as fd:
            write_all(fd, 0, b"bytes")
        staged.commit()
    assert {k: v for k, v in snapshot(tmp_path).items() if k != "target"} == {"out": b"bytes"}


def test_leaving_without_commit_leaves_nothing_and_no_parents(tmp_path: Path) -> None:
    with stage(tmp_path / "x" / "y" / "out") as staged:
        fill(staged)
        assert (tmp_path / "x" / "y" / ".out.partial").is_dir()
    assert snapshot(tmp_path) == {}


def test_bugs_of_callers_are_told(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staged:
        for name in ("", "/a", "../a", "a/../b", "a//b", "./a", staging.RECORD):
            with pytest.raises(ValueError, match="not a name for a file"):
                staged.write_bytes(name, b"")
        with pytest.raises(RuntimeError, match="planned with 10 bytes and has 12"), staged.new_file("a", 10) as fd:
            write_all(fd, 0, b"x" * 12)
        assert not staged.finished("a")
        with pytest.raises(RuntimeError, match="unfinished"):
            staged.commit()


# Rows 66 and 67: no room

CHILD = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from llava_convert.core.errors import ConvertError
    from llava_convert.storage.output import staging
    from llava_convert.storage.ranges import write_all

    SHARDS, SMALL = {shards!r}, {small!r}
    number, at, exchange = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "exchange"
    count = 0

    def counted(call):
        def wrapper(*args, **options):
            global count
            count += 1
            if count == at:
                os.kill(os.getpid(), number)
            return call(*args, **options)
        return wrapper

    if not exchange:
        def plain(new, out, *, exchange):
            if not exchange:
                new.rename(out)
            return not exchange
        staging._rename = plain
    out, force, resume = Path(sys.argv[1]), sys.argv[5] == "force", sys.argv[6] == "resume"
    with staging.interrupt_on_sigterm():
        try:
            names = "open write pwrite ftruncate fsync rename replace unlink rmdir mkdir close"
            for name in names.split():
                setattr(os, name, counted(getattr(os, name)))
            staging._rename = counted(staging._rename)
            with staging.Staging(out, "plan", force=force, resume=resume, needed_bytes=0, say=len) as staged:
                fill(staged)
                staged.commit()
            print(count)
        except KeyboardInterrupt as stop:
            print(stop, file=sys.stderr)
            sys.exit(130)
        except ConvertError as exc:
            print(exc.message, file=sys.stderr)
            sys.exit(exc.exit_code)
    """
).format(root=str(Path(__file__).parents[2]), shards=SHARDS, small=SMALL)
# pytest is slow to import, hence the children get the one function they need and not this module.
CHILD = CHILD.replace("def counted", inspect.getsource(fill).replace("staged: Staging", "staged") + "\ndef counted")


def child(
    out: Path, number: int = 0, at: int = 0, rename: str = "exchange", force: str = "force", resume: str = "resume"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(out), str(number), str(at), rename, force, resume]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@posix
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("limit", [0, 1, 3, 5, 60, 1024, 2999, 3000, 4500, 4999])
def test_row_66_file_size_limit_at_every_write(limit: int, old: bool, tmp_path: Path) -> None:
    import resource

    if old:
        make_old(tmp_path / "out")
    before = snapshot(tmp_path)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OutputError, match="File too large") as caught:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard[1]))
            build(tmp_path / "out", force=old)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    assert "ulimit" in str(caught.value.hint)
    assert snapshot(tmp_path) == before


@linux
@pytest.mark.parametrize("old", [True, False])
def test_row_66_disk_full_at_every_write(old: bool, small_disk: Path) -> None:
    if old:
        make_old(small_disk / "out")
    before, outcomes = snapshot(small_disk), set()
    for blocks in range(12):
        filler = small_disk.parent / "disk" / "filler"
        with filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(small_disk).free - 4096 * blocks))
        try:
            build(small_disk / "out", force=old)
            outcomes.add("built")
            assert tree(small_disk / "out") == NEW
            break
        except OutputError as exc:
            outcomes.add("refused")
            assert "No space left" in exc.message
        finally:
            filler.unlink()
        assert snapshot(small_disk) == before
    assert outcomes == {"built", "refused"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@linux
def test_row_69_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="Read-only"), stage(small_disk / "out"):
        pass


def test_row_67_too_little_room_is_told_before_the_first_byte(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"needs 4,611,686,018,427,387,904 bytes, .* has [\d,]+ free"),
        stage(tmp_path / "new" / "out", needed_bytes=1 << 62),
    ):
        pass
    assert snapshot(tmp_path) == {}


# Row 68: signals


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n in signal.Signals if n.name in ("SIGKILL", "SIGINT", "SIGTERM", "SIGHUP")])
@pytest.mark.parametrize("mode", ["fresh", "exchange", "aside"])
def test_row_68_stopped_before_every_system_call(mode: str, number: signal.Signals, tmp_path: Path) -> None:
    rename, force = ("aside" if mode == "aside" else "exchange"), ("no" if mode == "fresh" else "force")

    def prepared(name: str) -> Path:
        out = tmp_path / name / "out"
        out.parent.mkdir()
        if mode != "fresh":
            make_old(out)
        return out

    counting = child(prepared("count"), 0, 0, rename, force)
    assert counting.returncode == 0, counting.stderr
    total = int(counting.stdout)
    assert total > 40

    def stop(at: int) -> str:
        out = prepared(str(at))
        ended = child(out, number, at, rename, force)
        state = "new" if out.exists() and tree(out) == NEW else "old" if out.exists() and tree(out) == OLD else "?"
        state = state if os.path.lexists(out) else "absent"
        if number == signal.SIGKILL:
            assert ended.returncode == -9
            if mode == "aside" and state == "absent":
                assert tree(out.with_name(".out.old")) == OLD
                with pytest.raises(OutputError, match="exists"):  # restores it, and then refuses it
                    build(out)
                assert snapshot(out.parent)["out"] == OLD
                state = "aside"
        else:
            assert ended.returncode == 130, (at, ended.stderr)
            assert ("is complete" in ended.stderr) == (state == "new"), (at, ended.stderr)
            assert ("nothing was left" in ended.stderr) <= (state != "new"), (at, ended.stderr)
            assert [p.name for p in out.parent.iterdir()] == (["out"] if state != "absent" else [])
        build(out, force=True, resume=True)
        assert snapshot(out.parent) == {"out": NEW}, at
        return state

    with ThreadPoolExecutor(4) as threads:
        # The handlers of the other signals are one: a third of the points is enough for each.
        step = 1 if number in (signal.SIGKILL, signal.SIGINT) else 3
        states = set(threads.map(stop, range(total, 0, -step)))
    expected = {"new", "absent" if mode == "fresh" else "old"}
    assert states == expected | ({"aside"} if mode == "aside" and number == signal.SIGKILL else set())


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("old", [True, False])
def test_row_68_a_signal_after_the_output_is_in_its_place(
    number: signal.Signals, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = staging._rename, tmp_path / "out"
    if old:
        make_old(out)

    def rename(*arguments: Any, **more: Any) -> bool:
        done = real(*arguments, **more)
        signal.raise_signal(number)
        return done

    monkeypatch.setattr(staging, "_rename", rename)
    with pytest.raises(Interrupted, match=f"^interrupted; {re.escape(str(out))} is complete$"), interrupt_on_sigterm():
        build(out, force=True)
    assert snapshot(tmp_path) == {"out": NEW}


@posix
def test_row_68_a_signal_before_that(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="interrupted; nothing was left behind"), stage(out) as staged:
        staged.write_bytes("config.json", b"{}")
        signal.raise_signal(signal.SIGINT)
    assert snapshot(tmp_path) == {}


@posix
def test_row_68_in_a_second_thread_a_signal_is_the_main_threads(tmp_path: Path) -> None:
    """The commit in the second thread goes on while the first is told of the signal."""
    out, here, told = tmp_path / "out", threading.Event(), threading.Event()

    def convert() -> None:
        with stage(out) as staged:
            fill(staged)
            here.set()
            assert told.wait(30)
            staged.commit()

    thread = threading.Thread(target=convert)
    thread.start()
    assert here.wait(30)
    with pytest.raises(Terminated), interrupt_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    told.set()
    thread.join(30)
    assert snapshot(tmp_path) == {"out": NEW}


def leave_half(out: Path, plan: str = "plan", **options: Any) -> None:
    """What a killed run leaves: one finished file, one unfinished, small ones, no lock held."""
    keeper = stage(out, plan, **options)
    keeper.__enter__()
    with keeper.new_file("a.safetensors", 3000) as fd:
        write_all(fd, 0, SHARDS["a.safetensors"])
    keeper.write_bytes("config.json", b"torn")
    saved = out.with_name("saved")
    keeper.path.rename(saved)  # a copy would be other files
    (saved / "sub").mkdir()
    (saved / "sub" / ("b.safetensors" + staging.UNFINISHED)).write_bytes(b"half")
    keeper.__exit__(None, None, None)
    saved.rename(keeper.path)


def test_row_68_resume_keeps_finished_files_of_the_same_plan(tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    leave_half(out)
    inode = (tmp_path / ".out.partial" / "a.safetensors").stat().st_ino
    with stage(out, resume=True, say=lines.append) as staged:
        assert staged.finished("a.safetensors")
        assert not staged.finished("config.json")
        assert not staged.finished("sub/b.safetensors")
        assert set(tree(staged.path)) == {staging.RECORD, "a.safetensors"}
        fill(staged)
        staged.commit()
    assert (out / "a.safetensors").stat().st_ino == inode
    assert snapshot(tmp_path) == {"out": NEW}
    assert lines == ["resuming: 1 finished files kept, 3,000 bytes"]


@pytest.mark.parametrize(("plan", "resume"), [("other", True), ("plan", False)])
def test_row_68_other_leftovers_are_discarded_with_a_line(plan: str, resume: bool, tmp_path: Path) -> None:
    lines: list[str] = []
    leave_half(tmp_path / "out", plan)
    with stage(tmp_path / "out", resume=resume, say=lines.append) as staged:
        assert list(tree(staged.path)) == [staging.RECORD]
    assert len(lines) == 1
    assert lines[0].startswith(f"discarding {tmp_path / '.out.partial'}")


@pytest.mark.parametrize("damage", ["truncated file", "torn line", "no record", "missing file"])
def test_row_68_resume_believes_only_what_the_record_vouches_for(damage: str, tmp_path: Path) -> None:
    leave_half(tmp_path / "out")
    left = tmp_path / ".out.partial"
    if damage == "truncated file":
        os.truncate(left / "a.safetensors", 2999)
    elif damage == "torn line":
        os.truncate(left / staging.RECORD, (left / staging.RECORD).stat().st_size - 1)
    else:
        (left / ("a.safetensors" if damage == "missing file" else staging.RECORD)).unlink()
    with stage(tmp_path / "out", resume=True) as staged:
        assert not staged.finished("a.safetensors")
        assert list(tree(staged.path)) == [staging.RECORD]


def test_row_68_a_resumed_run_needs_room_for_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_half(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="needs 5,001 bytes"), stage(tmp_path / "out", resume=True, needed_bytes=8001):
        pass
    assert (tmp_path / ".out.partial" / "a.safetensors").exists()  # refused, not interrupted: the work is kept
    with stage(tmp_path / "out", resume=True, needed_bytes=8000):
        pass


@posix
def test_row_68_sigterm_becomes_terminated_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), interrupt_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(Terminated, KeyboardInterrupt)


def test_row_68_off_the_main_thread_signals_are_left_alone() -> None:
    seen: list[bool] = []

    def run() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with interrupt_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [True]


def test_row_68_threads_write_one_file_and_several(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    with stage(tmp_path / "out") as staged, ThreadPoolExecutor(8) as threads:

        def whole(number: int) -> None:
            with staged.new_file(f"{number}.bin", len(data)) as fd:
                write_all(fd, 0, data)

        with staged.new_file("shared.bin", len(data)) as fd:
            list(threads.map(lambda at: write_all(fd, at, data[at : at + 4096]), range(0, len(data), 4096)))
        list(threads.map(whole, range(16)))
        staged.commit()
    assert tree(tmp_path / "out") == {"shared.bin": data} | {f"{n}.bin": data for n in range(16)}


def test_row_68_a_late_writer_cannot_hit_another_file(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staged:
        with pytest.raises(ZeroDivisionError), staged.new_file("first", 8) as late:
            raise ZeroDivisionError
        with staged.new_file("second", 8) as fd:
            assert fd != late
            os.write(late, b"late")
        assert (staged.path / "second").read_bytes() == bytes(8)


# Row 69: places that cannot be written


@pytest.mark.parametrize(
    "name", ["CON", "nul.txt", "Com1", "LPT9.a.b", "aux ", "trailing.", "trailing ", "a" * 256, "a" * 250]
)
def test_row_69_names_that_some_system_refuses(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        stage(tmp_path / name)
    with stage(tmp_path / "out") as staged, pytest.raises(OutputError):
        staged.write_bytes(f"folder/{name}", b"")


def test_row_69_names_that_differ_in_case_only(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staged:
        staged.write_bytes("Model.json", b"")
        staged.write_bytes("Model.json", b"again")
        with pytest.raises(OutputError, match="case does not count"):
            staged.write_bytes("model.json", b"")


def test_row_69_a_part_of_the_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"), stage(tmp_path / "file" / "out"):
        pass
    assert snapshot(tmp_path) == {"file": b""}


@posix
def test_row_69_a_folder_of_another_owner(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() != 0:
        with pytest.raises(OutputError, match="Permission denied"), stage(locked / "out"):
            pass
        return
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match="Permission denied") as caught, stage(locked / "out"):
            pass
    finally:
        os.seteuid(0)
    assert "-o" in str(caught.value.hint)


@pytest.mark.parametrize("code", ["EDQUOT", "ENOSPC", "EIO", "EPERM"])
def test_row_69_errors_while_writing(code: str, tmp_path: Path) -> None:
    if not hasattr(errno, code):
        pytest.skip(f"no {code} here")
    make_old(tmp_path / "out")
    with (
        pytest.raises(OutputError, match=r"a\.bin cannot be written: reason"),
        stage(tmp_path / "out", force=True) as staged,
        staged.new_file("a.bin", 10),
    ):
        raise OSError(getattr(errno, code), "reason")
    assert snapshot(tmp_path) == {"out": OLD}


def test_row_69_an_error_about_another_file_is_not_the_outputs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), stage(tmp_path / "out") as staged, staged.new_file("a.bin"):
        (tmp_path / "absent source").read_bytes()


# Row 70: two converters


def test_row_70_a_held_lock_is_refused_with_its_holder(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staged:
        fill(staged)
        with pytest.raises(OutputError, match=f"out is in use by process {os.getpid()}"), stage(tmp_path / "out"):
            pass
        staged.commit()
    assert snapshot(tmp_path) == {"out": NEW}


@posix
def test_row_70_a_lock_that_was_removed_while_we_waited_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, tries = locks._lock, []

    def slow(fd: int, *, shared: bool) -> bool:
        tries.append(fd)
        if len(tries) == 1:  # the holder ends between our open and our lock
            (tmp_path / ".out.partial.lock").unlink()
        return lock(fd, shared=shared)

    monkeypatch.setattr(locks, "_lock", slow)
    with stage(tmp_path / "out"):
        assert len(tries) == 2
        with pytest.raises(OutputError, match="in use"), stage(tmp_path / "out"):
            pass


def test_row_70_many_at_once_are_never_two_inside(tmp_path: Path) -> None:
    inside, entered, most = threading.Lock(), [0], [0]

    def run(_: int) -> None:
        try:
            with stage(tmp_path / "out", force=True) as staged:
                with inside:
                    entered[0] += 1
                    most[0] = max(most[0], entered[0])
                fill(staged)
                staged.commit()
                with inside:
                    entered[0] -= 1
        except OutputError as exc:
            assert "in use" in exc.message

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(200)))
    assert most == [1]
    assert snapshot(tmp_path) == {"out": NEW}


# Row 71: renaming across devices


@pytest.mark.parametrize("exchange", [True, False])
def test_row_71_a_rename_across_devices_is_refused(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_old(tmp_path / "out")

    def refuse(*_: Any, **__: Any) -> bool:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if exchange:
        monkeypatch.setattr(staging, "_rename", refuse)
    else:
        no_exchange(monkeypatch)
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cross-device") as caught:
        build(tmp_path / "out", force=True)
    assert "another device" in str(caught.value.hint)
    assert snapshot(tmp_path) == {"out": OLD}


# Row 73: permissions


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_row_73_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        build(tmp_path / "a" / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == sorted(
        ["out", "sub", "a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json"]
    )


# Names of ours that something else has taken


def taken(place: Path, kind: str) -> None:
    """Put something at a name that a conversion needs for a file of its own."""
    precious = place.with_name("precious")
    precious.write_text("precious")
    if kind == "link":
        place.symlink_to(precious)
    elif kind == "link to nowhere":
        place.symlink_to("made-by-the-link")
    elif kind == "hard link":
        os.link(precious, place)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_text("notes of somebody")


@posix
@pytest.mark.parametrize("kind", ["link", "link to nowhere", "hard link", "pipe", "folder", "foreign file"])
def test_a_lock_that_is_not_ours_is_refused_and_left(kind: str, tmp_path: Path) -> None:
    taken(tmp_path / ".out.partial.lock", kind)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"\.out\.partial\.lock"), stage(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "precious").read_text() == "precious"
    if kind == "foreign file":
        assert (tmp_path / ".out.partial.lock").read_text() == "notes of somebody"


@posix
@pytest.mark.parametrize("text", [b"", b"12", b"1234\n", b"1234\nas", b"1234\naside\n"])
def test_a_lock_that_a_killed_run_left_is_taken(text: bytes, tmp_path: Path) -> None:
    (tmp_path / ".out.partial.lock").write_bytes(text)
    build(tmp_path / "out")
    assert snapshot(tmp_path) == {"out": NEW}


@posix
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_record_that_is_not_ours_vouches_for_nothing(kind: str, tmp_path: Path) -> None:
    leave_half(tmp_path / "out")
    record = tmp_path / ".out.partial" / staging.RECORD
    kept = record.read_bytes()
    record.unlink()
    taken(record, kind)
    if kind in ("link", "hard link"):
        (record.parent / "precious").write_bytes(kept)  # it says what the record did
    with stage(tmp_path / "out", resume=True) as staged:
        assert not staged.finished("a.safetensors")
        fill(staged)
        staged.commit()
    assert snapshot(tmp_path) == {"out": NEW}


@posix
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_finished_file_that_is_not_ours_is_made_anew(kind: str, tmp_path: Path) -> None:
    leave_half(tmp_path / "out")
    file = tmp_path / ".out.partial" / "a.safetensors"
    file.rename(tmp_path / "precious")
    if kind == "link":
        file.symlink_to(tmp_path / "precious")
    elif kind == "hard link":
        os.link(tmp_path / "precious", file)
    else:
        os.mkfifo(file)
    with stage(tmp_path / "out", resume=True) as staged:
        assert not staged.finished("a.safetensors")
        fill(staged)
        staged.commit()
    assert (tmp_path / "precious").read_bytes() == SHARDS["a.safetensors"]
    assert snapshot(tmp_path) == {"out": NEW, "precious": SHARDS["a.safetensors"]}
    assert (tmp_path / "out" / "a.safetensors").stat().st_nlink == 1


@posix
def test_nothing_is_written_through_a_linked_folder(tmp_path: Path) -> None:
    leave_half(tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.partial" / "sub")
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".out.partial" / "sub").symlink_to(tmp_path / "theirs")
    with stage(tmp_path / "out", resume=True) as staged:
        fill(staged)
        staged.commit()
    assert list((tmp_path / "theirs").iterdir()) == []
    assert snapshot(tmp_path) == {"out": NEW, "theirs": {}}


@pytest.mark.parametrize("change", ["last bit", "zeros"])
@pytest.mark.parametrize("sha256", [False, True])
def test_a_finished_file_is_proven(sha256: bool, change: str, tmp_path: Path) -> None:
    """By what the kernel says of it, or by its digest: another one of the same size and time of change is refused."""
    leave_half(tmp_path / "out", sha256=sha256)
    file = tmp_path / ".out.partial" / "a.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if change == "last bit" else bytes(len(data)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    lines: list[str] = []
    with stage(tmp_path / "out", resume=True, say=lines.append) as staged:
        assert not staged.finished("a.safetensors")
        fill(staged)
        staged.commit()
    assert snapshot(tmp_path) == {"out": NEW}
    assert lines == ["resuming: 0 finished files kept, 0 bytes"]


def test_no_output_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says of a file proves it, whatever its size."""

    def refuse(*args: object, **named: object) -> None:
        raise AssertionError("a finished file was read")

    monkeypatch.setattr(finished, "read_into", refuse)
    with stage(tmp_path / "out") as staged:
        with staged.new_file("1.safetensors", 3 << 20) as fd:
            write_all(fd, 0, bytes(3 << 20))
        staged.settle()
        assert (staged.path / staging.RECORD).read_bytes().count(b"\n") == 2  # the plan's and the file's
        staged.commit()


def test_large_files_are_vouched_for_too(tmp_path: Path) -> None:
    """They are hashed in a thread: each has its line once the next one is finished."""
    size = 3 << 20
    with stage(tmp_path / "out", sha256=True) as staged:
        for name in ("1.safetensors", "2.safetensors", "3.safetensors"):
            with staged.new_file(name, size) as fd:
                write_all(fd, 0, name.encode() * (size // len(name) + 1))
                os.ftruncate(fd, size)
        assert (staged.path / staging.RECORD).read_bytes().count(b"\n") in (3, 4)  # the plan's, two or three files'
        saved = shutil.copytree(staged.path, tmp_path / "saved")
    saved.rename(tmp_path / ".out.partial")
    with stage(tmp_path / "out", resume=True) as staged:
        assert staged.finished("1.safetensors") and staged.finished("2.safetensors")


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_either_digest_vouches_where_it_can_be_computed(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shared files. xxh3-128 is an extra, else sha256 is written: a record of the other vouches for nothing."""
    both = finished._algorithms()
    alone = {name: both[name] for name in both if name == algorithm}
    monkeypatch.setattr(finished, "_algorithms", lambda: alone)
    leave_half(tmp_path / "out", share="one")
    assert f'"{algorithm}:' in (tmp_path / ".out.partial" / f"{staging.RECORD}-one").read_text()
    shutil.copytree(tmp_path / ".out.partial", tmp_path / "saved")
    with stage(tmp_path / "out", resume=True) as staged:
        assert staged.finished("a.safetensors")
    (tmp_path / "saved").rename(tmp_path / ".out.partial")
    other = {name: both[name] for name in both if name != algorithm}
    monkeypatch.setattr(finished, "_algorithms", lambda: other)
    with stage(tmp_path / "out", resume=True) as staged:
        assert not staged.finished("a.safetensors")
