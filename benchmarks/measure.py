"""Time whole processes and watch their memory; `cp` is the yardstick."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PERIOD = 0.005  # between two looks at a process's memory; one look costs 0.03 ms
DISK_EVERY = 20  # looks at memory for one at the disk
CLI = (sys.executable, "-c", "from llava_convert.cli import main; main()")
MB = 10**6


@dataclass(frozen=True)
class Run:
    """One run: seconds of wall time and of processor time, peak anonymous memory and peak resident size in bytes.

    `temporary` is what lay on the disk at the peak beyond what is left at the end, where that was looked at.
    """

    seconds: float
    user: float = 0.0
    system: float = 0.0
    anonymous: int = 0
    resident: int = 0
    temporary: int = 0


class RunError(Exception):
    """A program under measurement failed; its last lines say why."""


def _sizes(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def on_disk(folder: Path) -> int:
    """Bytes that the files under a folder take; holes take none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it may be gone since it was listed
                found = os.stat(os.path.join(place, name))  # noqa: PTH116, PTH118 (pathlib is slow in a polling loop)
                total += getattr(found, "st_blocks", found.st_size / 512) * 512
    return int(total)


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    extra: dict[str, str] | None = None,
    work: Path | None = None,
) -> Run:
    """Run a program to its end. Memory is 0 where there is no /proc. Raises RunError.

    `work` is the folder that it writes in, where temporary disk is of interest.
    """
    anonymous = resident = disk = looks = 0
    over = threading.Event()
    # Compiled modules are kept between runs, as where pip compiled them.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env={**env, **(extra or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def watch() -> None:
        nonlocal anonymous, resident, disk, looks
        while not over.wait(PERIOD):
            found = _sizes(process.pid)
            anonymous = max(anonymous, found.get("RssAnon", 0))
            resident = max(resident, found.get("VmHWM", 0))
            if work is not None and looks % DISK_EVERY == 0:
                disk = max(disk, on_disk(work))
            looks += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    after = os.times()
    if process.returncode:
        raise RunError(f"{' '.join(map(str, command[:4]))} … exited {process.returncode}:\n{errors[-2000:]}")
    user, system = after.children_user - before.children_user, after.children_system - before.children_system
    temporary = max(0, disk - on_disk(work)) if work is not None else 0
    return Run(seconds, user, system, anonymous, resident, temporary)


def copy(files: Sequence[Path], target: Path, *, keep: bool = True) -> Run:
    """What the budgets call `cp`: each file copied without reflink, then made durable.

    The copies stay, as a conversion's output does: memory that a removed one gives back is handed out again at once,
    where fresh memory costs the kernel as much as the copying. Without `keep` each goes before the next one is made,
    off the clock, and the disk needs room for the largest only.
    """
    target.mkdir()
    seconds = 0.0
    before = os.times()
    for number, file in enumerate(files):
        place = target / f"{number}-{file.name}"
        reflink = ["--reflink=never"] if sys.platform == "linux" else []
        start = time.perf_counter()
        subprocess.run(["cp", *reflink, str(file), str(place)], check=True)
        subprocess.run(["sync", str(place)], check=True)
        seconds += time.perf_counter() - start
        if not keep:
            place.unlink()
    after = os.times()
    return Run(seconds, after.children_user - before.children_user, after.children_system - before.children_system)


def warm(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cool(files: Sequence[Path]) -> None:
    """Put files out of the page cache, where the system can. What is not on the disk yet stays."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def quiesce() -> None:
    """Wait until everything written so far is on the disk, so that one run does not pay for another's."""
    if hasattr(os, "sync"):
        os.sync()


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
