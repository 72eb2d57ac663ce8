"""`llava-convert upload DIR REPO`: a folder onto the hubs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_convert.cli import _hub_options as hubs
from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.cli.convert_command import parse_alpha


def add_to(app: typer.Typer) -> None:
    app.command(
        "upload",
        help="Publish a folder on Hugging Face or ModelScope, once it is proven to be what was converted.",
        rich_help_panel="Publish",
    )(_upload)


def _upload(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What a conversion wrote, or another checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME; made if it is not there.")],
    hub: hubs.HubOption = "huggingface",
    private: hubs.Private = False,
    revision: hubs.Revision = None,
    create_pr: hubs.CreatePr = False,
    message: Annotated[
        str | None, typer.Option("--message", help="Message of the commit.", rich_help_panel=hubs.HUB_PANEL)
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            "--verify",
            metavar="full|off",
            help="full: the recorded sha256 of every file, or --source.",
            rich_help_panel=opt.CHECK_PANEL,
        ),
    ] = "full",
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="Compare DIR with what it was converted from, now.",
            rich_help_panel=opt.CHECK_PANEL,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="FILE",
            help="Publish this file of DIR though it looks like a secret; may be given again.",
            rich_help_panel=hubs.HUB_PANEL,
        ),
    ] = None,
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
        from llava_convert.api import upload
        from llava_convert.storage.output.signals import interrupt_on_sigterm

        with interrupt_on_sigterm():
            published = upload(
                folder,
                repo,
                hub=hub,
                private=private,
                revision=revision,
                create_pr=create_pr,
                message=message,
                verify=verify,
                source=source,
                llm=llm,
                visual_encoder=visual_encoder,
                pretrained_pth=pretrained_pth,
                config=config,
                lora_alpha=parse_alpha(lora_alpha),
                cache=cache,
                include=include or (),
                progress=output,
            )
        output.stop()
        hubs.tell(published, output)
        output.result({"published": [one.as_json() for one in published]})

    raise typer.Exit(run(action, output))
