"""`llava-convert verify SOURCE OUT`: are the weights the same?"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.cli.convert_command import parse_alpha

if TYPE_CHECKING:  # read late, so that `--help` stays quick
    from llava_convert.engine.compare import Difference


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
        )
        verdict = verify(source, out, options, output, part=part)
        output.stop()
        output.result(verdict.as_json())
        for note in verdict.notes:
            output.warn(note)
        if verbose:
            for name, gap in sorted(verdict.different.items()):
                output.line(f"  differs: {name} in {gap.elements} elements, by at most {gap.largest:.3g}")
            for name, gap in sorted(verdict.rounded.items()):
                output.line(f"  rounded otherwise: {name} in {gap.elements} elements, by at most {gap.largest:.3g}")
        verdict.refuse()
        rows = max(verdict.added_rows.values(), default=0)
        quantised = f", {verdict.quantised} of them the source's quantisation, recomputed" if verdict.quantised else ""
        output.line(
            f"the same: {verdict.equal} tensors equal bit for bit{quantised}"
            + (f"; {_rounded(verdict.rounded.values())}" if verdict.rounded else "")
            + (f"; {rows} rows that the source does not have are not compared" if rows else "")
        )

    raise typer.Exit(run(action, output))


def _rounded(merged: Collection[Difference]) -> str:
    count = sum(difference.elements for difference in merged)
    return f"{len(merged)} more but for {count} elements, which a merge of LoRA in float32 rounds otherwise"
