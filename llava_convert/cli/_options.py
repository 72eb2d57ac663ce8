"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOURCE_PANEL, OUTPUT_PANEL, CHECK_PANEL, TALK_PANEL = "Source", "Output", "Checks and safety", "Talk"
GGUF_PANEL = "GGUF"

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A file, a folder, a training work_dir; a hub's model (ORG/NAME, hf://…, ms://…), or a URL (s3://…).",
    ),
]
Llm = Annotated[
    str | None,
    typer.Option(
        "--llm",
        metavar="PATH|ID",
        help="Base language model, where the source does not hold its weights.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
VisualEncoder = Annotated[
    str | None,
    typer.Option(
        "--visual-encoder", metavar="PATH|ID", help="Base vision tower, likewise.", rich_help_panel=SOURCE_PANEL
    ),
]
PretrainedPth = Annotated[
    Path | None,
    typer.Option(
        "--pretrained-pth",
        metavar="PATH",
        help="Stage-1 checkpoint, for parts that were trained there.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="CFG.py",
        help="xtuner training config; read, never run. Not needed when the .pth carries it.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache",
        help="Download what a hub holds to its client's cache, instead of reading it in place.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
LoraAlpha = Annotated[
    str | None,
    typer.Option(
        "--lora-alpha",
        metavar="N",
        help="LoRA alpha, where nothing tells it or what tells it is wrong: one number, or llm=N,visual-encoder=M.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
PartOption = Annotated[
    str,
    typer.Option(
        "--part", metavar="all|llm|projector|visual-encoder", help="Only one part.", rich_help_panel=OUTPUT_PANEL
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.", rich_help_panel=TALK_PANEL)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.", rich_help_panel=TALK_PANEL)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every detail; tracebacks with errors.", rich_help_panel=TALK_PANEL)
]
