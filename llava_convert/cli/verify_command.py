"""`llava-convert verify SOURCE OUT`: are the weights the same?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.cli.convert_command import parse_alpha

if TYPE_CHECKING:  # read late, so that `--help` stays quick
    pass


def add_to(app: typer.Typer) -> None:
    app.command(
        "verify",
        help="Compare OUT with SOURCE, tensor by tensor, whoever converted it.",
        rich_help_panel="Look and check",
    )(_verify)


def _verify(
    source: opt.Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A checkpoint of any layout, from any converter.")],
    llm: opt.Llm = None,
    visual_encoder: opt.VisualEncoder = None,
    pretrained_pth: opt.PretrainedPth = None,
    config: opt.Config = None,
    lora_alpha: opt.LoraAlpha = None,
    adapter: opt.Adapter = None,
    strict: Annotated[bool, typer.Option("--strict", help="Unrecorded vocabulary rows are a difference.")] = False,
    cache: opt.Cache = False,
    part: opt.PartOption = "all",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    output = Output(as_json, quiet, verbose)

    def action() -> None:
        from llava_convert.app.convert import verify
        from llava_convert.app.options import SourceOptions
        from llava_convert.model.recipe import Bases

        options = SourceOptions(
            config=config,
            pretrained_pth=pretrained_pth,
            bases=Bases(llm, visual_encoder, lora_alpha=parse_alpha(lora_alpha), cache=cache),
            adapter=tuple(adapter or ()),
        )
        verdict = verify(source, out, options, output, part=part)
        output.stop()
        output.result(verdict.as_json())
        for note in verdict.notes:
            output.warn(note)
        if verbose:
            for name, gap in sorted(verdict.different.items()):
                how = f"in {gap.elements} elements, by at most {gap.largest:.3g}" if gap.shapes is None else "in shape"
                output.line(f"  differs: {name} {how}")
            for name, gap in sorted(verdict.rounded.items()):
                output.line(f"  rounded otherwise: {name} in {gap.elements} elements, by at most {gap.largest:.3g}")
            for name, reason in verdict.harmless.items():
                output.line(f"  differs, and decides nothing: {name} ({reason})")
            for what in verdict.not_compared:
                output.line(f"  not compared: {what}")
        verdict.refuse(strict=strict)
        output.line(verdict.sentence())

    raise typer.Exit(run(action, output))
