"""`llava-convert inspect SOURCE`: what it is and why, and what it can become."""

from __future__ import annotations

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output, human_bytes


def add_to(app: typer.Typer) -> None:
    app.command(
        "inspect",
        help="Reporter what a checkpoint is, what it lacks and what it can become.",
        rich_help_panel="Look and check",
    )(_inspect)


def _inspect(
    source: opt.Source,
    llm: opt.Llm = None,
    visual_encoder: opt.VisualEncoder = None,
    pretrained_pth: opt.PretrainedPth = None,
    config: opt.Config = None,
    lora_alpha: opt.LoraAlpha = None,
    cache: opt.Cache = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    output = Output(as_json, quiet, verbose)

    def action() -> None:
        from llava_convert.app.inspect import inspect
        from llava_convert.app.options import SourceOptions
        from llava_convert.cli.convert_command import parse_alpha
        from llava_convert.model.recipe import Bases

        found = inspect(
            source,
            SourceOptions(
                config=config,
                pretrained_pth=pretrained_pth,
                bases=Bases(llm, visual_encoder, lora_alpha=parse_alpha(lora_alpha), cache=cache),
            ),
        )
        output.result(found.as_json())
        output.line(f"{found.path}: {found.layout} ({found.why})")
        for part in found.parts:
            size = human_bytes(part.bytes) if part.tensors else ""
            dtypes = ", ".join(part.dtypes)
            output.line(
                f"  {part.name:<15} {part.state:<7} {part.tensors:>5} tensors  {size:>9}  {dtypes}  {part.detail}"
            )
        for key, value in found.settings.items():
            output.line(f"  {key:<15} {value}")
        if verbose:
            for line in found.details:
                output.line(f"  {line}")
        output.line("can become:")
        for target, problem in found.targets.items():
            output.line(f"  {target:<9} " + ("yes" if problem is None else f"no: {problem}"))
        output.fetched(found.fetched)
        for text in found.notes:
            output.note(text)
        for text in found.warnings:
            output.warn(text)

    raise typer.Exit(run(action, output))
