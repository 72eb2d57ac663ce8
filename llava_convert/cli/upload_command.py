"""`llava-convert upload DIR REPO`: a folder onto the hubs."""

from __future__ import annotations

import typer

from llava_convert.app.jobs import UploadJob
from llava_convert.cli._options import command
from llava_convert.cli._output import Output


def add_to(app: typer.Typer) -> None:
    make = app.command(
        "upload",
        help="Publish a folder on Hugging Face or ModelScope, once it is proven to be what was converted.",
        rich_help_panel="Publish",
    )
    make(command("upload", UploadJob, _upload))


def _upload(job: UploadJob, output: Output) -> None:
    published = job.run(output)
    output.stop()
    output.published(published)
    output.result({"source": str(job.folder), "published": [one.as_json() for one in published]})
