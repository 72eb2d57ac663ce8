"""A conversion killed anywhere leaves the output whole or absent, and the next run makes it whole: row 68.

The shim ends the process at one of its system calls: between two of them nothing on the disk changes, so that a call
chosen at random is a moment chosen at random, and the same one in each run of the tests.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.corpus import TINY, Corpus, accepted, assert_clean, run, tree
from tests.faults.system_calls import shimmed
from tests.hubs.runner import Ran, Runner

pytestmark = pytest.mark.slow

POINTS = 10
SEED = 68
KILLS, ALL_KILLS = 12, 250  # with --force, and as many without
# The calls which change the disk.
CHANGING = ",create,write,copy,truncate,sync,rename,mkdir,unlink,rmdir,"

End = Callable[..., Ran]
Whole = tuple[int, dict[str, str]]


def conversion(corpus: Corpus, out: Path, *more: str) -> tuple[str | Path, ...]:
    """Several shards, most of them copied."""
    vit = ("--visual-encoder", TINY / "vit")
    limit = ("--max-shard-size", "100KB", "--threads", "1")
    return ("official", corpus.layouts["official"], "--to", "hf", "-o", out, *vit, *limit, *more)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with shimmed() as made:
        yield made


@pytest.fixture(scope="module")
def ended(runner: Runner, corpus: Corpus) -> End:
    """Runs it in a process which gets signal `number` at call `at` of those that change the folder of OUT."""

    def end(out: Path, at: int, number: int, *more: str, after: bool = False, log: Path | None = None) -> Ran:
        fault = {"FAULT_PATHS": str(out.parent), "FAULT_OPS": CHANGING, "FAULT_AT": str(at)}
        fault["FAULT_SIGNAL"] = str(int(number) + 1000 * after)
        fault |= {"FAULT_LOG": str(log)} if log is not None else {}
        return runner(*conversion(corpus, out, *more), **fault)

    return end


def calls(ended: End, out: Path, log: Path, *more: str) -> list[str]:
    """The calls of a run that nothing disturbs; it leaves its output at `out`."""
    ran = ended(out, 0, 0, *more, log=log)
    assert ran.code == 0, ran.stderr
    return log.read_text().splitlines()


@pytest.fixture(scope="module")
def whole(ended: End, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The number of calls of an undisturbed run, and what it makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    total = len(calls(ended, out, out.parent.with_name("log")))
    found = tree(out)
    assert len([name for name in found if name.endswith(".safetensors")]) >= 4 and total > 40
    return total, found


def point(total: int, number: int) -> int:
    """The calls to end at: the first, the last four, where the output is put in place, and those between."""
    last = [total, total - 1, total - 2, total - 4]
    return last[number] if number < len(last) else 1 + (number - len(last)) * total // (POINTS - len(last))


@pytest.mark.parametrize("number", range(POINTS))
def test_fault_68_killed(ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, number: int) -> None:
    """Absent or whole; a rerun, with and without --resume, makes what an undisturbed run makes."""
    total, wanted = whole
    folder = tmp_path / "killed"
    folder.mkdir()
    ran = ended(folder / "out", point(total, number), signal.SIGKILL)
    assert ran.code == -signal.SIGKILL, ran.stderr
    if (folder / "out").exists():
        assert tree(folder / "out") == wanted
        if not (folder / ".out.partial").exists():
            assert run(*conversion(corpus, folder / "out")).code == 6  # it is done
    for more in ((), ("--resume",)):
        again = Path(shutil.copytree(folder, tmp_path / "-".join(("again", *more)), symlinks=True))
        accepted(*conversion(corpus, again / "out", "--force", *more))
        assert tree(again) == {"out": "folder"} | {f"out/{name}": kind for name, kind in wanted.items()}


def test_fault_68_resume_keeps_what_was_finished(ended: End, corpus: Corpus, tmp_path: Path, whole: Whole) -> None:
    total, wanted = whole
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    assert ended(out, total // 3, signal.SIGKILL).code == -signal.SIGKILL
    assert not out.exists()
    finished = {file.name: file.stat() for file in partial.glob("*.safetensors")}
    assert 0 < len(finished) < len([name for name in wanted if name.endswith(".safetensors")])
    ran = accepted(*conversion(corpus, out, "--resume"))
    assert f"resuming: {len(finished)} finished files kept" in ran.stderr
    for name, before in finished.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert tree(out) == wanted
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--resume would keep"),
        (("--resume", "--max-shard-size", "50KB"), "another plan"),
        (("--resume", "--digest"), "left by a killed run"),
    ],
    ids=["without --resume", "another plan", "digests"],
)
def test_fault_68_a_leftover_that_is_not_resumed_is_discarded_with_a_line(
    ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, more: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    assert ended(out, whole[0] // 3, signal.SIGKILL).code == -signal.SIGKILL
    ran = accepted(*conversion(corpus, out, *more))
    assert "discarding" in ran.stderr and said in ran.stderr
    fresh = tmp_path / "fresh" / "out"
    accepted(*conversion(corpus, fresh, *more))
    assert tree(out) == tree(fresh)
    assert_clean(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6])
def test_fault_68_killed_over_an_old_output(
    ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, number: int
) -> None:
    """With --force OUT is the old one or the new one at every moment, never a mixture."""
    total, wanted = whole
    out = tmp_path / "out"
    accepted("official", corpus.layouts["official"], "--to", "hf", "--part", "llm", "-o", out)
    old = tree(out)
    assert old != wanted
    ran = ended(out, point(total, number), signal.SIGKILL, "--force")
    assert ran.code in (-signal.SIGKILL, 0), ran.stderr
    assert tree(out) in (old, wanted)
    accepted(*conversion(corpus, out, "--force"))
    assert tree(tmp_path) == {"out": "folder"} | {f"out/{name}": kind for name, kind in wanted.items()}


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_68_interrupted(
    ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, number: int, share: float
) -> None:
    """Exit 130, nothing left, the old output as it was."""
    out = tmp_path / "out"
    more: tuple[str, ...] = ()
    if share > 0.3:
        out.mkdir()
        (out / "precious").write_bytes(b"x")
        more = ("--force",)
    before = tree(tmp_path)
    ran = ended(out, max(3, int(whole[0] * share)), number, *more)
    assert ran.code == 130, ran.stderr
    assert ran.stderr.splitlines()[-1] == "error: interrupted; nothing was left behind"
    assert "Traceback" not in ran.stderr and ran.stdout == ""
    assert tree(tmp_path) == before


def killed_at_random(
    ended: End, corpus: Corpus, folder: Path, wanted: dict[str, str], count: int, *, force: bool
) -> list[str]:
    """SIGKILL at this many calls, then the same again, every second time with --resume; returns what was wrong."""
    chance = random.Random(SEED + force)
    more = ("--force",) if force else ()
    found, moments = [], 0
    for turn in range(count):
        here = folder / str(turn)
        here.mkdir()
        if force:
            (here / "out").mkdir()
            (here / "out" / "precious").write_bytes(b"old")
        old = tree(here / "out")
        if not moments:
            measured = Path(shutil.copytree(here, folder / "measured"))
            moments = len(calls(ended, measured / "out", folder / "log", *more))
        at = chance.randint(1, moments)
        ran = ended(here / "out", at, signal.SIGKILL, *more)
        there = tree(here / "out") if (here / "out").exists() else {}
        resumed = ("--resume",) if turn % 2 else ()
        again = run(*conversion(corpus, here / "out", "--force", *resumed))
        right = ran.code == -signal.SIGKILL and there in (old, wanted) and again.code == 0
        if not right or tree(here) != {"out": "folder"} | {f"out/{name}": kind for name, kind in wanted.items()}:
            found.append(
                f"at {at} of {moments}: exit {ran.code}, then {again.code}: {sorted(tree(here))}{again.stderr}"
            )
        shutil.rmtree(here)
    return found


@pytest.mark.parametrize("force", [True, False])
def test_fault_68_killed_at_random(ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, force: bool) -> None:
    assert killed_at_random(ended, corpus, tmp_path, whole[1], KILLS, force=force) == []


@pytest.mark.sweep
@pytest.mark.parametrize("force", [True, False])
def test_fault_68_killed_at_500_random_calls(
    ended: End, corpus: Corpus, tmp_path: Path, whole: Whole, force: bool
) -> None:
    assert killed_at_random(ended, corpus, tmp_path, whole[1], ALL_KILLS, force=force) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("force", [True, False])
def test_fault_68_a_signal_around_the_moment_when_out_is_put_in_place(
    ended: End, tmp_path: Path, whole: Whole, number: signal.Signals, force: bool
) -> None:
    """Before and after each call from the last syncs on: what is told of OUT is true; it is the old or the new."""
    more = ("--force",) if force else ()
    out = tmp_path / "in" / "out"

    def restore() -> dict[str, str]:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if force:
            out.mkdir()
            (out / "precious").write_bytes(b"old")
        return tree(out)

    old = restore()
    made = calls(ended, out, tmp_path / "log", *more)
    moment = next(n for n, line in enumerate(made, 1) if line == f"rename 0 {out}")
    assert moment < len(made) - 2
    for at in range(moment - 2, min(moment + 5, len(made)) + 1):
        for after in (False, True):
            restore()
            ran = ended(out, at, number, *more, after=after)
            there = tree(out) if out.exists() else {}
            assert there in (old, whole[1]), (at, after, ran.stderr)
            assert ran.code in (0, 130), (at, after, ran.stderr)
            if there == old:
                assert ran.code == 130 and "nothing was left behind" in ran.stderr, (at, after, ran.stderr)
            elif ran.code == 130:
                assert f"{out} is complete" in ran.stderr, (at, after, ran.stderr)
            assert [p.name for p in out.parent.iterdir()] == (["out"] if there else []), (at, after, ran.stderr)
