"""`llava-convert sweep PATTERN --to LAYOUT -o TARGET/{name}`: every checkpoint of a run."""

from __future__ import annotations

from llava_convert.app.jobs.convert import SweepJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core import heap


def made(name: str) -> Command:
    return command(name, SweepJob, _sweep)


def _sweep(job: SweepJob, output: Output) -> None:
    from llava_convert.app.sweep import refuse

    heap.share()
    items = job.run(output)
    output.stop()
    width = max(len(item.source) for item in items)
    for item in items:
        output.line(f"{item.source:<{width}}  {item.state:<13}  {item.out}")
    output.result(
        {"source": job.source, "done": not job.dry_run, "checkpoints": [item.as_json() for item in items]},
    )
    refuse(items)
