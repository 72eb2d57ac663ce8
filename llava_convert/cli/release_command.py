"""`llava-convert release SOURCE --name ORG/NAME`: every layout of a model, each in its repository."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_convert.app.jobs.publish import ReleaseJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core.text import human_bytes

if TYPE_CHECKING:
    from llava_convert.app.publish.release import ReleaseItem


def made(name: str) -> Command:
    return command(name, ReleaseJob, _release)


def _release(job: ReleaseJob, output: Output) -> None:
    items = job.run(output)
    output.stop()
    _print_table(items, job.hubs, output)
    if job.dry_run:
        output.note("nothing was written or sent (--dry-run)")
    layouts = [item.as_json() for item in items]
    output.result(
        {
            "source": str(job.source),
            "name": job.name,
            "hubs": list(job.hubs),
            "done": not job.dry_run,
            "layouts": layouts,
        }
    )


def _print_table(items: Sequence[ReleaseItem], onto: Sequence[str], output: Output) -> None:
    width = max((len(item.repo) for item in items), default=0)
    for item in items:
        output.line(
            f"{item.repo:<{width}}  {item.row.layout:<8}  {len(item.files):>3} files  {human_bytes(item.size):>9}  "
            f"{item.story}, {', '.join(onto)}"
        )
        if output.verbose:
            for path in item.files:
                output.line(f"  {path}")
    for item in items:
        output.published(item.published)
