"""`make bench`: time conversions against `cp` and the peers. Figures depend on machine and load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks import gguf_jobs, memory, merge_jobs, save_jobs
from benchmarks.jobs import planned
from benchmarks.report import as_json, markdown, show

ROOT = Path(__file__).resolve().parent.parent
# One run of each peer, for the table in docs/performance.md.
TABLE = ("xtuner", "gguf-f16", "gguf-q4_k_m", "merge", "save")
PEERS = ("peers", "xtuner", "merge", "save", "gguf", *(job.name for job in gguf_jobs.JOBS))
LONG = ("memory", *PEERS)  # only where they are asked for
JOBS = ("help", "inspect", "rename", "pth32", "pth16", *LONG)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--jobs", nargs="+", choices=JOBS, default=[j for j in JOBS if j not in LONG], help="what to run"
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.5, 1, 2, 4], help="bytes read, in GB")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs a job")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="where the models are made and kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of peers here")
    chosen = parser.parse_args()
    if "peers" in chosen.jobs:
        chosen.jobs += TABLE
    cache = chosen.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 160)
    rows = []
    xtuner = ROOT / ".venvs" / "xtuner" / "bin" / "python"
    if "xtuner" in chosen.jobs and not xtuner.exists():
        console.print("xtuner is left out: `make peers` builds its environment")
    steps = planned(chosen.jobs, chosen.sizes, chosen.repeats, cache, xtuner)
    merges = merge_jobs.planned(chosen.jobs, chosen.sizes, chosen.repeats, cache)
    if merges and merge_jobs.missing():
        console.print(merge_jobs.missing())
    steps += merges
    saves = save_jobs.planned(chosen.jobs, chosen.sizes, chosen.repeats, cache)
    if saves and save_jobs.missing():
        console.print(save_jobs.missing())
    steps += saves
    steps += memory.planned(chosen.jobs, chosen.sizes, cache)
    wanted = gguf_jobs.planned(chosen.jobs, chosen.sizes, chosen.repeats, cache)
    if wanted and gguf_jobs.missing():
        console.print(gguf_jobs.missing())
    else:
        steps += wanted
    try:
        for name, step in steps:
            console.print(f"{name} …")
            rows += step()
    finally:  # also where a step fails, an hour of others being done
        show(rows, console)
    if chosen.markdown is not None:
        chosen.markdown.write_text(markdown(rows), encoding="utf-8")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(as_json(rows), indent=2))


if __name__ == "__main__":
    main()
