"""`make fuzz`: each reader for a while under atheris (libFuzzer for Python), then conversions of each kind of file.

    python -m tests.fuzz [--seconds 20] [TARGET ...]     fuzz; exit 1 when there are findings, whose inputs are kept
    python -m tests.fuzz --replay FILE TARGET            one input again, with its traceback; needs no atheris
    python -m tests.fuzz [--seconds 20] [KIND ...]       conversions alone (`conversions`): two kinds at a time
    python -m tests.fuzz --case NUMBER KIND              one conversion again, with its traceback

A finding does not end a run: the input is kept once for each place that it was raised at. What libFuzzer itself kills a
run for (its time or memory is up) it keeps as `timeout-*` and `oom-*`. Inputs that reached new code stay too, for the
next run to start from. All of it lies in `.venv/fuzz/TARGET`. A conversion is known by its kind and number.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType

HOME = Path(sys.prefix) / "fuzz"
INPUT_SECONDS = 10
MEMORY_MB = 1536  # 400 of which are torch, which makes the seeds
SHARED_MEMORY = Path("/dev/shm")
_KINDS = ("finding", "crash", "timeout", "oom")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", nargs="*")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--case", type=int, metavar="NUMBER")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first conversion of each kind")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return _fuzz(asked.target[0], asked.seconds)
    from tests.fuzz.conversions import KINDS
    from tests.fuzz.rounds import again, rounds
    from tests.fuzz.targets import TARGETS

    unknown = set(asked.target) - set(TARGETS) - set(KINDS)
    if unknown or ((asked.replay or asked.case is not None) and len(asked.target) != 1):
        parser.error(f"targets are {', '.join(TARGETS)}; kinds are {', '.join(KINDS)}")
    if asked.replay:
        return _replay(asked.target[0], asked.replay)
    if asked.case is not None:
        return again(asked.target[0], asked.case)
    targets = [name for name in asked.target or TARGETS if name in TARGETS]
    kinds = [name for name in asked.target or KINDS if name in KINDS and name not in targets]
    found = [_campaign(name, asked.seconds) for name in targets]
    return max([*found, int(rounds(kinds, asked.seconds, asked.first))])


def _campaign(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own; 1 when there are findings."""
    for old in _findings(name):
        old.unlink()
    child = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--child", "--seconds", str(seconds), name]
    ran = subprocess.run(child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log = ran.stdout.decode("utf-8", "replace")
    done = [line for line in log.splitlines() if line.startswith("Done ")]
    found = _findings(name)
    if not done and not found:
        print(log)
    print(f"{name:14} {done[0] if done else f'ended early (exit {ran.returncode})'}; {len(found)} findings", flush=True)
    for path in found:
        said = next((line for line in log.splitlines() if line.startswith(f"FINDING {path.name}")), path.name)
        print(f"    {said}\n    python -m tests.fuzz --replay {path} {name}", flush=True)
    return int(bool(found) or not done)


def _findings(name: str) -> list[Path]:
    return sorted(path for kind in _KINDS for path in (HOME / name).glob(f"{kind}-*"))


def _fuzz(name: str, seconds: int) -> int:
    """The child: runs until libFuzzer ends the process."""
    import atheris  # type: ignore[import-not-found]  # installed by `make fuzz` alone

    with atheris.instrument_imports(include=["llava_convert"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.guard import FindingError, accepts

    target, home = TARGETS[name], HOME / name
    corpus, words = home / "corpus", home / "words.dict"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds().values():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            accepts(target.lay(data, folder), folder)
        except FindingError as finding:
            place = _place(finding)
            if place not in seen:
                seen.add(place)
                path = home / f"finding-{hashlib.sha1(place.encode()).hexdigest()[:12]}"
                path.write_bytes(data)
                print(f"\nFINDING {path.name}: {place}", flush=True)

    options = {
        "max_total_time": seconds, "timeout": INPUT_SECONDS, "rss_limit_mb": MEMORY_MB, "max_len": target.limit,
        "artifact_prefix": f"{home}/",
    } | ({"dict": words} if target.words else {})  # fmt: skip
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], one)
    atheris.Fuzz()
    return 0


def _place(finding: BaseException) -> str:
    """What was raised and where in the package, so that one bug counts once."""
    error = finding.__cause__ or finding
    at: TracebackType | None = error.__traceback__
    inner = [frame for frame in traceback.extract_tb(at) if "llava_convert" in frame.filename]
    where = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}" if inner else ""
    # A message may hold parts of the input, so it names the place only where the canary wrote it.
    return f"{type(error).__name__} {where} {str(error)[:80] if error is finding else ''}".strip()


def _replay(name: str, path: Path) -> int:
    from tests.fuzz.guard import accepts, bounded
    from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory() as made, bounded():
        read = TARGETS[name].lay(path.read_bytes(), Path(made))
        print("taken" if accepts(read, Path(made)) else "refused, as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
