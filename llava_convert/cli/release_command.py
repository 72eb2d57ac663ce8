"""`llava-convert release SOURCE --name ORG/NAME`: every layout of a model, each in its repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_convert.cli import _hub_options as hubs
from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output, human_bytes
from llava_convert.cli.convert_command import parse_alpha
from llava_convert.layouts.info import TARGETS

if TYPE_CHECKING:
    from llava_convert.app.publish.release import Item


def add_to(app: typer.Typer) -> None:
    app.command(
        "release",
        help="Convert a model to every layout and publish each in a repository of its own.",
        rich_help_panel="Publish",
    )(_release)


def _release(
    source: opt.Source,
    name: Annotated[
        str,
        typer.Option(
            "--name",
            metavar="ORG/NAME",
            help="Repositories: "
            f"{', '.join(f'NAME{target.repo_suffix} ({name})' for name, target in TARGETS.items())}, NAME-pretrain.",
        ),
    ],
    hub: hubs.HubOption = "huggingface",
    private: hubs.Private = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar=",".join((*TARGETS, "pretrain")),
            help="These layouts. Default: all; pretrain where there is a stage-1 checkpoint.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="Holds one folder a layout. Default: ./NAME.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = None,
    outtype: opt.Outtype = None,
    llm: opt.Llm = None,
    visual_encoder: opt.VisualEncoder = None,
    llm_id: opt.LlmId = None,
    visual_encoder_id: opt.VisualEncoderId = None,
    pretrained_pth: opt.PretrainedPth = None,
    config: opt.Config = None,
    lora_alpha: opt.LoraAlpha = None,
    cache: opt.Cache = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the table; write nothing, send nothing.", rich_help_panel=opt.CHECK_PANEL
        ),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    output = Output(as_json, quiet, verbose)

    def action() -> None:
        from llava_convert.api import type_names
        from llava_convert.app.options import SourceOptions
        from llava_convert.app.publish.publish import named_hubs
        from llava_convert.app.publish.release import Release, plan, run_release
        from llava_convert.model.recipe import Bases
        from llava_convert.storage.hubs import Destination
        from llava_convert.storage.output.signals import interrupt_on_sigterm

        wanted = Release(
            source,
            name,
            SourceOptions(
                config=config,
                pretrained_pth=pretrained_pth,
                bases=Bases(llm, visual_encoder, llm_id, visual_encoder_id, parse_alpha(lora_alpha), cache),
            ),
            Destination(name, named_hubs(hub), private),
            only=tuple(word.strip() for word in only.split(",")) if only else (),
            out=out,
            outtypes=type_names(outtype),
        )
        with interrupt_on_sigterm():
            items = plan(wanted) if dry_run else run_release(wanted, output)
        output.stop()
        _print_table(items, wanted.to.hubs, output)
        if dry_run:
            output.note("nothing was written or sent (--dry-run)")
        layouts = [item.as_json() for item in items]
        output.result({"name": name, "hubs": list(wanted.to.hubs), "done": not dry_run, "layouts": layouts})

    raise typer.Exit(run(action, output))


def _print_table(items: Sequence[Item], onto: Sequence[str], output: Output) -> None:
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
        hubs.tell(item.published, output)
