"""What is timed: each job makes its model, says what to run and beside which yardstick, and what its budget is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.make import made, make_header_only, make_official, make_pth
from benchmarks.measure import CLI, MB, Run, copy, discard, quiesce, run, warm

GB = 10**9
ANONYMOUS = 300 * MB
PEER = "xtuner"


@dataclass(frozen=True)
class Row:
    """A job's runs, each beside its yardstick's run; without a yardstick the budget is in seconds.

    With one it is in times of the yardstick's seconds, and `grace` is how many seconds may come on top.
    """

    job: str
    size: float
    ours: tuple[Run, ...]
    yardstick: str = ""
    theirs: tuple[Run, ...] = ()
    budget: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    what: str = ""  # what all were asked for, where peers are compared
    grace: float = 0.0


@dataclass(frozen=True)
class Conversion:
    """One kind of conversion. `dtype` is that of the source's LLM."""

    name: str
    source: str
    dtype: str
    to: str
    budget: float
    grace: float


CONVERSIONS = (
    Conversion("rename official-hf", "official", "F16", "hf", 1.15, 0.25),
    Conversion("rename hf-official", "hf", "F16", "official", 1.15, 0.25),
    Conversion("pth32-official", "pth", "F32", "official", 1.3, 0.6),
    Conversion("pth32-hf", "pth", "F32", "hf", 1.3, 0.6),
    Conversion("pth16-official", "pth", "BF16", "official", 1.3, 0.6),
    Conversion("pth16-hf", "pth", "BF16", "hf", 1.3, 0.6),
)


def conversion(job: Conversion, size: float, repeats: int, cache: Path) -> Row:
    """Time a conversion against `cp` of the weight files that it reads, one after the other, `repeats` times."""
    source, files, options = prepare(job, size, cache)
    work = cache / "work"
    discard(work)
    work.mkdir()
    warm(files)
    ours, theirs = [], []
    for _ in range(repeats):
        quiesce()
        theirs.append(copy(files, work / "copy"))
        discard(work / "copy")
        quiesce()
        ours.append(convert(source, job.to, work / "out", options))
        discard(work / "out")
    notes = []
    if imports_torch(["convert", source, "--to", job.to, "-o", work / "out", *options]):
        notes.append("imports torch")
    discard(work)
    return Row(job.name, size, tuple(ours), "cp", tuple(theirs), job.budget, tuple(notes), grace=job.grace)


def prepare(job: Conversion, size: float, cache: Path) -> tuple[Path, list[Path], list[str | Path]]:
    """The source, the weight files that will be read, and the options that the conversion needs."""
    nbytes = int(size * GB)
    if job.source == "pth":
        folder = made(cache / f"pth-{job.dtype}-{size:g}", make_pth, nbytes, job.dtype)
        return folder / "iter_1.pth", [folder / "iter_1.pth", folder / "vit" / "model.safetensors"], []
    official = made(cache / f"official-{job.dtype}-{size:g}", make_official, nbytes, job.dtype)
    tower: list[str | Path] = ["--visual-encoder", official / "tower"]
    if job.source == "official":
        return official, sorted(official.glob("*.safetensors")), tower
    folder = made(cache / f"hf-{job.dtype}-{size:g}", lambda place: convert(official, "hf", place / "model", tower))
    return folder / "model", sorted((folder / "model").glob("*.safetensors")), []


def convert(source: Path, to: str, out: Path, options: Iterable[str | Path], *, work: Path | None = None) -> Run:
    return run([*CLI, "convert", source, "--to", to, "-o", out, "--quiet", *options], work=work)


def imports_torch(arguments: list[str | Path]) -> bool:
    """Whether the command imports torch, by the interpreter's own log."""
    command = [sys.executable, "-X", "importtime", *CLI[1:], *map(str, arguments)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in log.splitlines())


def start_up(name: str, repeats: int, cache: Path) -> Row:
    """Seconds from start to end: `--help`, or `inspect` of an 8B model's headers."""
    arguments: list[str | Path] = ["--help"]
    if name == "inspect":
        arguments = ["inspect", made(cache / "header-only-8B", make_header_only)]
    run([*CLI, *arguments])  # compiles what was edited since
    ours = tuple(run([*CLI, *arguments]) for _ in range(repeats))
    notes = ("imports torch",) if imports_torch(arguments) else ()
    return Row(name, 0, ours, budget={"--help": 0.2, "inspect": 0.5}[name], notes=notes)


def peer(size: float, repeats: int, cache: Path, python: Path) -> list[Row]:
    """Time against xtuner's own converter, on a model whose bases it can load."""
    folder = made(cache / f"{PEER}-{size:g}", make_pth, int(size * GB), "F32", llm_weights=True)
    where = subprocess.run(
        [python, "-c", "import xtuner.tools.model_converters as m; print(m.__path__[0])"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    work = cache / "work"
    rows = []
    for to, theirs_to in (("official", "official"), ("hf", "huggingface")):
        ours, theirs = [], []
        discard(work)
        work.mkdir()
        warm([*folder.rglob("*.safetensors"), folder / "iter_1.pth"])
        for _ in range(repeats):
            quiesce()
            command: list[str | Path] = [python, f"{where}/pth_to_hf.py", "config.py", "iter_1.pth", work / "theirs"]
            command += ["--save-format", theirs_to, "--safe-serialization"]
            # torch >= 2.6 refuses mmengine's pickles otherwise (FORMATS, quirk Q1).
            theirs.append(run(command, cwd=folder, extra={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, work=work))
            discard(work / "theirs")
            quiesce()
            ours.append(convert(folder / "iter_1.pth", to, work / "ours", [], work=work))
            discard(work / "ours")
        discard(work)
        memory = max(r.resident for r in ours) / max(r.resident for r in theirs)
        allowed = 1 / 10 if size >= 4 else 1 / 4
        note = f"peak RSS {memory:.2f} of xtuner's" + ("" if memory <= allowed else f", over {allowed:.2f}")
        budget = 0.2 if size >= 4 else None
        what = f"pth in float32, LoRA merged, to {to}"
        rows.append(Row(f"xtuner-{to}", size, tuple(ours), PEER, tuple(theirs), budget, notes=(note,), what=what))
    return rows


def planned(
    names: list[str], sizes: list[float], repeats: int, cache: Path, python: Path
) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What to run, in order, each with its name."""
    steps: list[tuple[str, Callable[[], list[Row]]]] = []
    for name in ("--help", "inspect"):
        if name.strip("-") in names:
            steps.append((name, lambda name=name: [start_up(name, max(repeats, 5), cache)]))  # type: ignore[misc]
    for size in sizes:
        for job in CONVERSIONS:
            if job.name.split()[0] in names or job.name.split("-")[0] in names:
                step = lambda job=job, size=size: [conversion(job, size, repeats, cache)]  # noqa: E731
                steps.append((f"{job.name} {size:g} GB", step))
        if PEER in names and python.exists():
            steps.append((f"{PEER} {size:g} GB", lambda size=size: peer(size, repeats, cache, python)))  # type: ignore[misc]
    return steps
