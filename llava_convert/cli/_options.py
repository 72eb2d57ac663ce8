"""Options that several commands share, described once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_convert.layouts.info import LAYOUTS, TARGETS

SOURCE_PANEL, OUTPUT_PANEL, CHECK_PANEL, TALK_PANEL = "Source", "Output", "Checks and safety", "Talk"


def choices(*values: str) -> dict[str, Any]:
    """Words that `--help` shows and TAB completes; typer's own would refuse others of the same meaning."""
    return {"metavar": f"[{'|'.join(values)}]", "autocompletion": offered(*values)}


def offered(*values: str) -> Callable[[str], list[str]]:
    """What TAB offers for an option that takes more than these."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete.lower())]


# Kept here as words, so that neither `--help` nor TAB need import the model; a test holds them to it.
_PARTS = ("all", "llm", "projector", "visual-encoder")
_OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A file, a folder, a training work_dir; a hub's model (ORG/NAME, hf://…, ms://…), or a URL (s3://…).",
    ),
]
To = Annotated[
    str,
    typer.Option(
        "--to",
        **choices(*TARGETS),
        help="Layout to convert to, or a program that loads it: "
        f"{', '.join(loader for info in LAYOUTS.values() for loader in info.loaders)}.",
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
        "--part",
        **choices(*_PARTS),
        help="Only one part.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="OUT",
        help="Output folder, or a URL (s3://…). Default: ./<source's stem>_<layout>.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Name in the card. Default: OUT's last part.", rich_help_panel=OUTPUT_PANEL),
]
LlmId = Annotated[
    str | None,
    typer.Option(
        "--llm-id",
        metavar="ID",
        help="Hub id of the LLM to write into configs.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
VisualEncoderId = Annotated[
    str | None,
    typer.Option(
        "--visual-encoder-id",
        metavar="ID",
        help="Hub id of the tower, likewise.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
AsFamily = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="FAMILY",
        help="Write the language model as another family that computes the same: a Phi-3 as llama, and back.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        **choices("auto", "float16", "bfloat16", "float32"),
        help="auto: what the training loaded its language model in, if of 16 bits; else the source's, or float16.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="keep|5GB|…",
        help="Default: shards follow the source's; 2GB (5GB for hf) for a .pth.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
PromptTemplate = Annotated[
    str | None,
    typer.Option(
        "--prompt-template",
        metavar="NAME",
        help="Chat template, by xtuner's name for it. Default: the one trained with.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
ImageProcessor = Annotated[
    str | None,
    typer.Option(
        "--image-processor",
        **choices("clip", "llava"),
        help="clip (the default) crops pictures to squares and loads everywhere; llava pads them, as training did.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Outtype = Annotated[
    str | None,
    typer.Option(
        "--outtype",
        metavar="auto|f16|q8_0|q4_k_m|…[,…]",
        autocompletion=offered(*_OUTTYPES),
        help="Types of the language model, one file each. auto: bf16 for a bf16 source, else f16.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
MmprojOuttype = Annotated[
    str | None,
    typer.Option(
        "--mmproj-outtype",
        metavar="f16|q8_0|…[,…]",
        help="Types of the mmproj (tower and projector). Default: f16.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Pre = Annotated[
    str | None,
    typer.Option(
        "--pre",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer. Default: recognised by how it cuts text.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Make floats of a quantised source; its rounding stays.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR",
        help="PEFT adapter to merge (may be given several times), or none: leave out those beside the model.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
AllowKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Key of a config that no table knows and that may be left behind.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
Verify = Annotated[
    str | None,
    typer.Option(
        "--verify",
        **choices("quick", "full", "off"),
        help="quick: headers and files; full: every byte recomputed. Default: quick; full with --push.",
        rich_help_panel=CHECK_PANEL,
    ),
]
Digest = Annotated[
    bool,
    typer.Option("--digest", help="Record an xxh3-128 digest of each tensor.", rich_help_panel=CHECK_PANEL),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan; write nothing.", rich_help_panel=CHECK_PANEL),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace OUT; the old one survives any failure.", rich_help_panel=CHECK_PANEL),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep the finished shards of a killed run of the same plan.",
        rich_help_panel=CHECK_PANEL,
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        metavar="N",
        help="Threads; 0: one a core, at most 4. Changes no byte.",
        rich_help_panel=CHECK_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.", rich_help_panel=TALK_PANEL)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.", rich_help_panel=TALK_PANEL)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every detail; tracebacks with errors.", rich_help_panel=TALK_PANEL)
]
