"""`llava-convert upload DIR REPO`: a folder onto the hubs."""

from __future__ import annotations

from llava_convert.app.jobs.publish import UploadJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output


def made(name: str) -> Command:
    return command(name, UploadJob, _upload)


def _upload(job: UploadJob, output: Output) -> None:
    published = job.run(output)
    output.stop()
    output.published(published)
    output.result({"source": str(job.folder), "published": [one.as_json() for one in published]})
