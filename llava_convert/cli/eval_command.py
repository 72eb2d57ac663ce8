"""`llava-convert eval`: score a model of any layout."""

from __future__ import annotations

import typer

from llava_convert.app.jobs import MMBenchJob
from llava_convert.cli._options import command
from llava_convert.cli._output import Output


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Score a model of any layout.")
    group.command("mmbench", help="MMBench and CCBench, by xtuner's prompt and rule, from their TSV files.")(
        command("eval mmbench", MMBenchJob, _mmbench)
    )
    app.add_typer(group, name="eval", rich_help_panel="Ask")


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
