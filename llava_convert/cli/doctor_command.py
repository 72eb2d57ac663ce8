"""`llava-convert doctor DIR --for PROGRAM`: the problems that the program would have, and their repair."""

from __future__ import annotations

from llava_convert.app.jobs.look import DoctorJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output


def made(name: str) -> Command:
    return command(name, DoctorJob, _doctor)


def _doctor(job: DoctorJob, output: Output) -> None:
    found = job.run(output)
    output.result(found.as_json())
    for trouble in found.troubles:
        state = "fixed" if trouble.fixed else "fixable" if trouble.fixable else "not fixable here"
        output.line(f"{trouble.rule} ({state}): {trouble.what}")
        if output.verbose or not (trouble.fixable or trouble.fixed):
            output.line(f"  known from: {trouble.source}")
        if trouble.hint and not trouble.fixed and not trouble.fixable:
            output.line(f"  {found.command(trouble)}")
    found.refuse()
    output.line(f"{found.folder}: no {'other ' if found.troubles else ''}problem found for {found.consumer}")
