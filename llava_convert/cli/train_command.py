"""`llava-convert train RECIPE`: the training module, which is imported only when it runs."""

from __future__ import annotations

import gc
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.core.flags import CHECKS, OUTPUT

RECIPE_PANEL = "Recipe"
STAGES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def made(_name: str) -> opt.Command:
    return train


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of an included recipe (--list).")
    ] = None,
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
        bool, typer.Option("--resume", help="Continue from the newest checkpoint there.", rich_help_panel=OUTPUT)
    ] = False,
    deepspeed: Annotated[
        str,
        typer.Option(
            "--deepspeed",
            metavar=opt.shown(*STAGES),
            autocompletion=opt.offered(*STAGES),
            help="Train with DeepSpeed; checkpoints are then folders. xtuner's names work too: deepspeed_zero2.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = "",
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Seed of new weights, order and dropout (train.seed).",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None,
    list_recipes: Annotated[
        bool,
        typer.Option(
            "--list", help="List the recipes with stage, model, data and memory. Train nothing.", rich_help_panel=CHECKS
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print recipe, data, memory, steps and what is missing. Train nothing.",
            rich_help_panel=CHECKS,
        ),
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
        from llava_convert.core.errors import UsageError
        from llava_convert.core.resources import training

        if list_recipes:
            found = training("listing").listing()
            for one in found:
                output.line(one["name"])
                output.line(f"  stage {one['stage']}: {one['trains']}; {one['model']}; {one['memory']}")
                output.line(f"  {one['data']}")
            output.note("memory: of one process without DeepSpeed, without the activations")
            output.result({"done": False, "out": None, "stages": [], "recipes": found})
            return
        if recipe is None:
            raise UsageError(
                "RECIPE is missing", hint="`llava-convert train --list` shows those that come with the package"
            )
        words = [*(changes or ()), *([] if seed is None else [f"train.seed={seed}"])]
        with training("recipe").hints_name(recipe, words):
            stages = training("recipe").load_recipe(recipe, words)
            runs = training("runs")
            runs.require_packages()
            runs.require_word(deepspeed)
            if dry_run:
                seen: list[Any] = []
                for stage in stages:
                    runs.build(stage)
                    before = seen[-1].recipe.name if seen else ""
                    seen.append(training("outlook").outlook(stage, before=before))
                    output.line(training("recipe").as_toml(stage))
                    for text in seen[-1].lines():
                        output.line(text)
                output.note("nothing was trained (--dry-run)")
                output.result({"done": False, "out": None, "stages": [one.as_json() for one in seen]})
                return
            last = runs.run(stages, work_dir, resume=resume, deepspeed=deepspeed, say=output)
            output.line(f"{last}: trained")
            output.note(f"next: llava-convert convert {shlex.quote(str(last))} --to hf")
            output.result({"done": True, "out": str(last), "stages": [{"name": stage.name} for stage in stages]})

    raise typer.Exit(run(action, output))
