"""`llava-convert inspect SOURCE`: what it is and why, and what it can become."""

from __future__ import annotations

from llava_convert.app.jobs.look import InspectJob
from llava_convert.cli._options import Command, command
from llava_convert.cli._output import Output
from llava_convert.core.text import human_bytes


def made(name: str) -> Command:
    return command(name, InspectJob, _inspect)


def _inspect(job: InspectJob, output: Output) -> None:
    found = job.run(output)
    output.result(found.as_json())
    if found.layout is None:
        output.line(f"{found.path}: {found.kind}")
    else:
        output.line(f"{found.path}: {found.layout} ({found.why})")
    output.line(f"  {'use':<15} {found.use}")
    for part in found.parts:
        size = human_bytes(part.bytes) if part.tensors else ""
        dtypes = ", ".join(part.dtypes)
        output.line(f"  {part.name:<15} {part.state:<7} {part.tensors:>5} tensors  {size:>9}  {dtypes}  {part.detail}")
    for key, value in found.settings.items():
        output.line(f"  {key:<15} {value}")
    if output.verbose:
        for line in found.details:
            output.line(f"  {line}")
    if found.targets:
        output.line("can become:")
    said: dict[str, str] = {}  # a base that is missing is missing for most of them
    for target, problem in found.targets.items():
        if problem is None:
            output.line(f"  {target:<9} yes")
        else:
            output.line(f"  {target:<9} no: {f'as for {said[problem]}' if problem in said else problem}")
            said.setdefault(problem, target)
    output.fetched(found.fetched)
    for text in found.notes:
        output.note(text)
    for text in found.warnings:
        output.warn(text)
    output.note(f"next: {found.next}")
