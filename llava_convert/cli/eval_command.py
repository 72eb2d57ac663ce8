"""`llava-convert eval`: score a model of any layout."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from llava_convert.app.jobs.ask import CompareJob, EvalJob, MMBenchJob
from llava_convert.cli._options import command
from llava_convert.cli._output import Output


class _TasksFirst(TyperGroup):
    """`eval mme SOURCE` is `eval tasks mme SOURCE`: a first word that is no command is a task."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["tasks", *args]
        return super().resolve_command(ctx, args)


def made(_name: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, cls=_TasksFirst)
    group.command("tasks", help="Run benchmarks of lmms-eval. The word may be left out: eval mme,pope SOURCE.")(
        command("eval tasks", EvalJob, _tasks)
    )
    group.command("mmbench", help="Run MMBench or CCBench from its TSV file, with xtuner's prompt and rule.")(
        command("eval mmbench", MMBenchJob, _mmbench)
    )
    group.command("compare", help="Compare two runs of mmbench: one page with the answers that changed.")(
        command("eval compare", CompareJob, _compare)
    )
    return group


def _compare(job: CompareJob, output: Output) -> None:
    found = job.run(output)
    output.result(found.as_json())
    output.line(f"{found.changed} of {found.questions} answers differ")
    if found.averages is not None:
        first, second = found.averages
        output.line(f"average {100 * first:.1f} % and {100 * second:.1f} %")
    output.note(f"see {found.report}")


def _tasks(job: EvalJob, output: Output) -> None:
    result = job.run(output)
    output.stop()
    output.result(result.as_json())
    output.line(result.table)
    output.note(f"every number is in {result.folder}")


def _mmbench(job: MMBenchJob, output: Output) -> None:
    from llava_convert.app.ask.processes import speaks

    result = job.run(output)
    output.stop()
    if not speaks():
        return
    output.result(result.as_json())
    if result.scores is None:
        output.line(f"{result.folder}: {result.questions} answers to submit; the file has no right ones to score by")
        return
    width = max(map(len, result.scores))
    for name, share in result.scores.items():
        output.line(f"{name:<{width}}  {100 * share:5.1f} %")
    output.note(f"answers and scores are in {result.folder}")
