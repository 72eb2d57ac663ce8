"""A conversion killed anywhere leaves the output whole or absent, and the next run makes it whole: row 68.

The child counts the calls which change the disk and ends itself at one of them: hooks of the test, none in the package.
"""

from __future__ import annotations

import shutil
import signal
from functools import cache
from pathlib import Path

import pytest

from tests.faults.corpus import TINY, Corpus, Ran, accepted, assert_clean, run, shell, tree

pytestmark = pytest.mark.slow

CHILD = """
import os, sys
at, number, seen = int(sys.argv.pop(1)), int(sys.argv.pop(1)), 0

def hooked(real):
    def call(*args, **options):
        global seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)
        return real(*args, **options)
    return call

for name in ("pwrite", "copy_file_range", "ftruncate", "fsync", "replace", "rename", "mkdir", "unlink"):
    setattr(os, name, hooked(getattr(os, name)))
from llava_convert.cli import main
try:
    main()
finally:
    if not at:
        print(seen, file=sys.stderr)
"""
POINTS = 10


def conversion(corpus: Corpus, out: Path, *more: str) -> tuple[str | Path, ...]:
    """Several shards, most of them copied; no torch, which takes longer to import than all of this to run."""
    vit = ("--visual-encoder", TINY / "vit")
    limit = ("--max-shard-size", "100KB", "--threads", "1")
    return ("official", corpus.layouts["official"], "--to", "hf", "-o", out, *vit, *limit, *more)


def ended(corpus: Corpus, out: Path, at: int, number: int, *more: str) -> Ran:
    """A run in a process of its own which gets signal `number` at call `at`."""
    return shell(str(at), str(int(number)), *conversion(corpus, out, *more), code=CHILD)


@cache
def calls(corpus_folder: Path, out: Path) -> int:
    """How many calls a run makes that nothing disturbs; it leaves its output at `out`."""
    corpus = Corpus(corpus_folder, {"official": corpus_folder / "official"})
    ran = ended(corpus, out, 0, 0)
    assert ran.code == 0, ran.stderr
    return int(ran.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The number of calls of an undisturbed run, and what it makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    total = calls(corpus.folder, out)
    found = tree(out)
    assert len([name for name in found if name.endswith(".safetensors")]) >= 4 and total > 40
    return total, found


def point(total: int, number: int) -> int:
    """The calls to end at: the first, the last four, where the output is put in place, and those between."""
    last = [total, total - 1, total - 2, total - 4]
    return last[number] if number < len(last) else 1 + (number - len(last)) * total // (POINTS - len(last))


@pytest.mark.parametrize("number", range(POINTS))
def test_fault_68_killed(corpus: Corpus, tmp_path: Path, whole: tuple[int, dict[str, str]], number: int) -> None:
    """Absent or whole; a rerun, with and without --resume, makes what an undisturbed run makes."""
    total, wanted = whole
    folder = tmp_path / "killed"
    folder.mkdir()
    ran = ended(corpus, folder / "out", point(total, number), signal.SIGKILL)
    assert ran.code == -signal.SIGKILL, ran.stderr
    if (folder / "out").exists():
        assert tree(folder / "out") == wanted
        if not (folder / ".out.partial").exists():
            assert run(*conversion(corpus, folder / "out")).code == 6  # it is done
    for more in ((), ("--resume",)):
        again = Path(shutil.copytree(folder, tmp_path / "-".join(("again", *more)), symlinks=True))
        accepted(*conversion(corpus, again / "out", "--force", *more))
        assert tree(again) == {"out": "folder"} | {f"out/{name}": kind for name, kind in wanted.items()}


def test_fault_68_resume_keeps_what_was_finished(
    corpus: Corpus, tmp_path: Path, whole: tuple[int, dict[str, str]]
) -> None:
    total, wanted = whole
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    assert ended(corpus, out, total // 3, signal.SIGKILL).code == -signal.SIGKILL
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
    corpus: Corpus, tmp_path: Path, whole: tuple[int, dict[str, str]], more: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    assert ended(corpus, out, whole[0] // 3, signal.SIGKILL).code == -signal.SIGKILL
    ran = accepted(*conversion(corpus, out, *more))
    assert "discarding" in ran.stderr and said in ran.stderr
    fresh = tmp_path / "fresh" / "out"
    accepted(*conversion(corpus, fresh, *more))
    assert tree(out) == tree(fresh)
    assert_clean(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6])
def test_fault_68_killed_over_an_old_output(
    corpus: Corpus, tmp_path: Path, whole: tuple[int, dict[str, str]], number: int
) -> None:
    """With --force OUT is the old one or the new one at every moment, never a mixture."""
    total, wanted = whole
    out = tmp_path / "out"
    accepted("official", corpus.layouts["official"], "--to", "hf", "--part", "llm", "-o", out)
    old = tree(out)
    assert old != wanted
    ran = ended(corpus, out, point(total, number), signal.SIGKILL, "--force")
    assert ran.code in (-signal.SIGKILL, 0), ran.stderr
    assert tree(out) in (old, wanted)
    accepted(*conversion(corpus, out, "--force"))
    assert tree(tmp_path) == {"out": "folder"} | {f"out/{name}": kind for name, kind in wanted.items()}


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_68_interrupted(
    corpus: Corpus, tmp_path: Path, whole: tuple[int, dict[str, str]], number: int, share: float
) -> None:
    """Exit 130, nothing left, the old output as it was."""
    out = tmp_path / "out"
    more: tuple[str, ...] = ()
    if share > 0.3:
        out.mkdir()
        (out / "precious").write_bytes(b"x")
        more = ("--force",)
    before = tree(tmp_path)
    ran = ended(corpus, out, max(3, int(whole[0] * share)), number, *more)
    assert ran.code == 130, ran.stderr
    assert ran.stderr.splitlines()[-1] == "error: interrupted; nothing was left behind"
    assert "Traceback" not in ran.stderr and ran.stdout == ""
    assert tree(tmp_path) == before
