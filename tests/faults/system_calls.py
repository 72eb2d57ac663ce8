"""One system call of the command goes wrong: jobs to try it on, the calls that they make, and how they must end.

`shim.c` says what can go wrong. The commands run in forks of one process that has it loaded and all modules imported;
it acts only on paths of the job: its source, and the folder that OUT lies in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.corpus import tree
from tests.hubs.runner import Ran, Runner

SOURCE, OUTPUT = "source", "output"
# What a system call of each side may end with. Nothing is lost where it is no more than a hint: exit 0 is always right.
CODES = {SOURCE: 3, OUTPUT: 6}
# Calls which remove what is staged, or look for it: where they fail, something may stay, and is named.
REMOVING = {"unlink", "rmdir", "open", "list", "stat", "close"}


def build_shim(folder: Path) -> Path:
    """The library of shim.c. Skips the test where there is no C compiler, or no preloading."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("faults of system calls need Linux and a C compiler: install gcc")
    built = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
    return built


@contextmanager
def shimmed(environment: Mapping[str, str] | None = None) -> Iterator[Runner]:
    """Runs the command with the shim, which does nothing until it is told."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"LD_PRELOAD": str(build_shim(Path(folder))), **(environment or {})}
        with Runner(more) as runner:
            yield runner


@dataclass(frozen=True)
class Call:
    """A system call that was struck (with which error) or only seen (0)."""

    op: str
    code: int
    path: Path


@dataclass(frozen=True)
class Tried:
    """How a run ended, and the call that was struck; None where it ended before."""

    ran: Ran
    struck: Call | None
    calls: tuple[Call, ...] = ()


@dataclass
class Job:
    """A command that reads `source` and makes `out`, alone in its folder; `args` are without OUT."""

    runner: Runner
    folder: Path
    source: Path
    args: tuple[str | Path, ...]
    force: bool = True
    old: dict[str, str] = field(init=False)
    new: dict[str, str] = field(init=False)
    _source: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.folder / "made" / "out"
        self._log = self.folder / "log"
        self._source = tree(self.source)
        self.restore()
        self.old = tree(self.out)
        ran = self.run().ran
        assert ran.code == 0, ran.said
        self.new = tree(self.out)
        assert len(self.new) > 2

    def restore(self) -> None:
        """As before a run: an old output with --force, none without."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        if self.force:
            self.out.mkdir()
            (self.out / "precious").write_bytes(b"old")

    def run(self, *more: str, **fault: object) -> Tried:
        self._log.unlink(missing_ok=True)
        shim = {f"FAULT_{name.upper()}": str(value) for name, value in fault.items()}
        where = {"FAULT_PATHS": f"{self.source}:{self.out.parent}", "FAULT_LOG": str(self._log)} if fault else {}
        force = ("--force",) if self.force else ()
        ran = self.runner(*self.args, "-o", self.out, *force, *more, **{**where, **shim})
        calls = tuple(_calls(self._log))
        return Tried(ran, calls[0] if calls and fault.get("at") else None, calls)

    def calls(self) -> tuple[Call, ...]:
        """The calls of a run that nothing disturbs."""
        self.restore()
        tried = self.run(at=0)
        assert tried.ran.code == 0, tried.ran.said
        return tried.calls

    def side(self, call: Call) -> str:
        return SOURCE if call.path.is_relative_to(self.source) else OUTPUT

    def wrong(self, tried: Tried) -> list[str]:
        """What is not as it must be after a run in which a call failed; nothing where all is right."""
        ran, struck = tried.ran, tried.struck
        found = []
        if "Traceback" in ran.said or "this is a bug" in ran.said:
            found.append("a bug is told")
        there = tree(self.out)
        beside = sorted(p.name for p in self.out.parent.iterdir() if p != self.out)
        allowed = {0} if struck is None else {0, CODES[self.side(struck)]}
        if ran.code not in allowed:
            found.append(f"exit {ran.code}, not one of {sorted(allowed)}")
        if ran.code == 0:
            if there != self.new:
                found.append("exit 0, and OUT is not what an undisturbed run makes")
        else:
            if there != self.old or self.out.exists() != self.force:
                found.append("OUT is not as it was before" + (" but the new one" if there == self.new else ""))
            lines = ran.stderr.splitlines()
            at = [n for n, line in enumerate(lines) if line.startswith("error: ")]
            if len(at) != 1 or len(lines) <= at[0] + 1 or not lines[at[0] + 1].startswith("  → "):
                found.append("no error in a sentence with its next step")
        told = struck is not None and struck.op in REMOVING and all(name in ran.stderr for name in beside)
        if beside and not told:
            found.append(f"left beside OUT, and not named: {beside}")
        if tree(self.source) != self._source:
            found.append("the source was changed")
        return found


def _calls(log: Path) -> Iterator[Call]:
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            op, code, path = line.split(" ", 2)
            yield Call(op, int(code), Path(path))


def sweep(job: Job, points: Iterable[int], **fault: object) -> list[str]:
    """Let each of these calls fail, one in a run; returns what was wrong, in words."""
    found = []
    for at in points:
        job.restore()
        tried = job.run(at=at, **fault)
        if problems := job.wrong(tried):
            found.append(f"{at} {tried.struck}: {'; '.join(problems)}\n{tried.ran.said}")
    return found
