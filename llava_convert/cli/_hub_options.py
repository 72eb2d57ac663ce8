"""Options of the commands that publish, and how they tell what they did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from llava_convert.cli._options import choices
from llava_convert.cli._output import Output, human_bytes

if TYPE_CHECKING:
    from llava_convert.engine.report import Published

HUB_PANEL = "Publish"

Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="REPO",
        help="Publish OUT afterwards, once every byte is verified.",
        rich_help_panel=HUB_PANEL,
    ),
]
_HUB = typer.Option(
    "--hub",
    **choices("huggingface", "modelscope", "both"),
    help="Where to publish; the token is the one that the hub's own client keeps.",
    rich_help_panel=HUB_PANEL,
)
HubOption = Annotated[str, _HUB]
PushHub = Annotated[str | None, _HUB]  # says nothing where nothing is pushed
Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository private, if it is to be made.", rich_help_panel=HUB_PANEL),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="BRANCH", help="Publish on this branch of REPO.", rich_help_panel=HUB_PANEL),
]
CreatePr = Annotated[
    bool,
    typer.Option("--create-pr", help="Publish as a pull request (Hugging Face alone).", rich_help_panel=HUB_PANEL),
]


def tell(published: Iterable[Published], output: Output) -> None:
    for one in published:
        there = f", {one.skipped} of them were there already" if one.skipped else ""
        state = "as they are here" if one.compared else "sent"
        output.line(f"{one.url}: {one.files} files, {human_bytes(one.bytes)}, {state}{there}")
