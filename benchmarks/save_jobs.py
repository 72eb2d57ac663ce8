"""A folder of transformers written again in float16, beside transformers itself, mlx-vlm's converter and mergekit.

mlx-vlm writes its own layout, which is the same tensors under other names. mergekit gets the language model alone: of a
whole LLaVA 0.1.5 wrote 4 of 71 tensors and ended well, since it takes its names from transformers 5, not from the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import Row, convert
from benchmarks.make import made
from benchmarks.measure import Run, discard, quiesce, run, warm
from benchmarks.merge_jobs import make_base

ROOT = Path(__file__).resolve().parent.parent
MLX = ROOT / ".venvs" / "beside-mlx" / "bin" / "python"
MERGEKIT = ROOT / ".venvs" / "mergekit" / "bin" / "mergekit-yaml"
DTYPE = "float16"

Peer = Callable[[Path, Path], list[str | Path]]
"""The command that writes a source again, into a folder."""


def _transformers(source: Path, out: Path) -> list[str | Path]:
    return [sys.executable, ROOT / "benchmarks" / "save_by_transformers.py", source, out]


def _mlx(source: Path, out: Path) -> list[str | Path]:
    return [MLX, "-m", "mlx_vlm.convert", "--hf-path", source, "--mlx-path", out, "--dtype", DTYPE]


def _mergekit(source: Path, out: Path) -> list[str | Path]:
    config = source.parent / "mergekit.yml"
    config.write_text(f"merge_method: passthrough\ndtype: {DTYPE}\nmodels: [{{model: {source}}}]\n", encoding="utf-8")
    return [MERGEKIT, config, out]


@dataclass(frozen=True)
class Job:
    """`peers` have what has to be there of them. With `part` they read that alone, which ours takes from the whole."""

    name: str
    what: str
    peers: dict[str, tuple[Path, Peer]]
    part: str = ""


JOBS = (
    Job(
        "save",
        f"hf in bfloat16 to hf in {DTYPE}",
        {"transformers": (Path(sys.executable), _transformers), "mlx-vlm": (MLX, _mlx)},
    ),
    Job(
        "save-llm",
        f"the language model alone, bfloat16 to {DTYPE}",
        {"mergekit": (MERGEKIT, _mergekit)},
        "llm",
    ),
)


def make_part(folder: Path, model: Path, part: str) -> None:
    """`model`, a part of a LLaVA of transformers."""
    convert(model, "hf", folder / "model", ["--part", part])


def compare(job: Job, size: float, repeats: int, cache: Path) -> list[Row]:
    """Each peer and ours in turn, `repeats` times, from a source in the page cache."""
    model, work = made(cache / f"merge-{size:g}", make_base, int(size * 10**9)) / "model", cache / "work"
    source, options = model, ["--dtype", DTYPE]
    if job.part:
        source = made(cache / f"{job.name}-{size:g}", make_part, model, job.part) / "model"
        options += ["--part", job.part]
    peers = {name: command for name, (program, command) in job.peers.items() if program.exists()}
    discard(work)
    work.mkdir()
    theirs: dict[str, list[Run]] = {name: [] for name in peers}
    ours: list[Run] = []
    for _ in range(repeats):
        for name, command in peers.items():
            warm(list(source.glob("*.safetensors")))
            quiesce()
            theirs[name].append(run(command(source, work / name), work=work))
            discard(work / name)
        warm(list(model.glob("*.safetensors")))
        quiesce()
        ours.append(convert(model, "hf", work / "ours", options, work=work))
        discard(work / "ours")
    discard(work)
    return [
        Row(f"{job.name}-{name}", size, tuple(ours), name, tuple(runs), what=job.what) for name, runs in theirs.items()
    ]


def missing() -> str:
    """What to say when a peer is not here; empty when all are."""
    names = [name for job in JOBS for name, (program, _) in job.peers.items() if not program.exists()]
    return f"{', '.join(names)} left out: `make peers` builds the environment" if names else ""


def planned(
    names: list[str], sizes: list[float], repeats: int, cache: Path
) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What to run, in order, each with its name."""
    return [
        (f"{job.name} {size:g} GB", lambda job=job, size=size: compare(job, size, repeats, cache))  # type: ignore[misc]
        for size in sizes
        for job in JOBS
        if "save" in names
    ]
