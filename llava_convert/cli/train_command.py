"""`llava-convert train RECIPE`: the training module, which is imported only when it runs."""

from __future__ import annotations

import gc
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.core.flags import CHECKS, OUTPUT

RECIPE_PANEL = "Recipe"


def add_to(app: typer.Typer) -> None:
    app.command("train", help="Train a LLaVA; leaves checkpoints which convert.", rich_help_panel="Train")(train)


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of a recipe that comes with it.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe: lr=1e-4, data.root=/data, or for one stage finetune.train.lr=1e-4. Repeatable.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="DIR",
            help="Where checkpoints go. Default: work_dirs/<recipe's name>.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up the newest checkpoint there.", rich_help_panel=OUTPUT)
    ] = False,
    deepspeed: Annotated[
        str,
        typer.Option(
            "--deepspeed",
            metavar=opt.shown("zero1", "zero2", "zero3"),
            autocompletion=opt.offered("zero1", "zero2", "zero3"),
            help="Train with DeepSpeed; checkpoints are folders then.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print recipe, data, memory and steps; train nothing.", rich_help_panel=CHECKS),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Several processes: torchrun --nproc-per-node 8 -m llava_convert train RECIPE …, or accelerate launch."""
    output = Output(as_json, quiet, verbose, "train")

    def action() -> None:
        # Read when torch is loaded. OpenMP's threads spin while they wait for each other; where something else runs on
        # a core, an iteration of a small model then takes up to sixty times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        gc.enable()  # what training throws away holds whole tensors
        from llava_convert.core.resources import training

        with training("recipe").hints_name(recipe, changes or ()):
            stages = training("recipe").load_recipe(recipe, changes or ())
            runs = training("runs")
            if dry_run:
                found = [runs.outlook(stage) for stage in stages]
                for stage, seen in zip(stages, found, strict=True):
                    output.line(training("recipe").as_toml(stage))
                    for text in seen.lines():
                        output.line(text)
                output.note("nothing was trained (--dry-run)")
                output.result({"done": False, "out": None, "stages": [seen.as_json() for seen in found]})
                return
            last = runs.run(stages, work_dir, resume=resume, deepspeed=deepspeed, say=output)
            output.line(f"{last}: trained")
            output.note(f"next: llava-convert convert {shlex.quote(str(last))} --to hf")
            output.result({"done": True, "out": str(last), "stages": [{"name": stage.name} for stage in stages]})

    raise typer.Exit(run(action, output))
