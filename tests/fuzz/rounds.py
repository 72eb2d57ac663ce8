"""Conversions of damaged sources for a time: each kind in a process of its own, two at once.

python -m tests.fuzz.rounds KIND SECONDS FIRST       the child: prints findings, and a line of what it did at its end
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.conversions import Bench

AT_ONCE = 2
HANGS = 120  # seconds after which a case that even a signal cannot end is ended with its process
SHARED_MEMORY = Path("/dev/shm")
_SAID = "said: "


def rounds(kinds: Sequence[str], seconds: int, first: int = 0) -> bool:
    """Run each kind for so long, from the case `first` on; whether there were findings."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return any(list(pool.map(lambda kind: _round(kind, seconds, first), kinds)))


def again(kind: str, number: int) -> int:
    """One case again. The damaged file is left in the current folder's `case`, and a bug's traceback is printed."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        Path("case").write_bytes(bench.damaged(kind, number))
        print(bench.attempt(kind, number, reraise=True))
    return 0


def _round(kind: str, seconds: int, first: int) -> bool:
    done, found = "ended early", 0
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        child = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.rounds", kind, str(seconds), str(first), folder]
        with Path(folder, "stderr").open("w") as stderr:
            process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(_SAID):  # a library prints, too
                    continue
                said = json.loads(line.removeprefix(_SAID))
                done = said.get("done", done)
                if "number" in said:
                    found += 1
                    print(f"    {kind} {said['number']}: {said['place']}\n        {said['words']}", flush=True)
        if process.wait():
            at, found = Path(folder, "number"), found + 1
            number = at.read_text() if at.exists() else "at its start"
            print(f"    {kind} {number}: the process ended ({process.returncode})", flush=True)
            print(Path(folder, "stderr").read_text()[-3000:], flush=True)
    print(f"{kind:20} {done}; {found} findings", flush=True)
    return found > 0


def _child(kind: str, seconds: int, first: int, home: Path) -> None:
    bench, seen, codes = Bench(home / "bench"), set[str](), Counter[int]()
    bench.home.mkdir()
    bench.attempt(kind, first)  # imports what is to be imported
    start, number = time.monotonic(), first
    with (home / "number").open("w") as at:
        while time.monotonic() - start < seconds:
            at.seek(0)
            at.write(str(number))
            at.flush()
            faulthandler.dump_traceback_later(HANGS, exit=True)  # for what no signal handler of Python gets to see
            outcome = bench.attempt(kind, number)
            codes[outcome.code] += 1
            if outcome.place and outcome.place not in seen:
                seen.add(outcome.place)
                _say(number=number, place=outcome.place, words=outcome.words)
            number += 1
    faulthandler.cancel_dump_traceback_later()
    told = ", ".join(f"{count} exit {code}" for code, count in sorted(codes.items()))
    _say(done=f"{number - first} cases: {told}")


def _say(**what: object) -> None:
    print(_SAID + json.dumps(what), flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
