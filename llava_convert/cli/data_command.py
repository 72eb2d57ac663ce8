"""`llava-convert data`: whether training data are complete, and what mends them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_convert.cli import _options as opt
from llava_convert.cli._errors import run
from llava_convert.cli._output import Output


def made(_name: str) -> typer.Typer:
    data = typer.Typer(no_args_is_help=True)
    data.command("check", help="Find missing files and pictures of a recipe, and say where to get them.")(check)
    data.command("fix-ocrvqa", help="Copy OCR-VQA's pictures to the .jpg names that the data sets use.")(fix_ocrvqa)
    return data


def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of a recipe.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, for instance data.root=/data."),
    ] = None,
    open_pictures: Annotated[bool, typer.Option("--open", help="Decode every picture, to find broken ones.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    output = Output(as_json, quiet, verbose, "data check")

    def action() -> None:
        from llava_convert.core.errors import InputError
        from llava_convert.core.resources import training

        found = []
        for stage in training("recipe").load_recipe(recipe, changes or ()):
            if stage.build is not None:
                output.note(f"{stage.name}: makes its own data when it is trained")
            else:
                encoder = training("bases").local_encoder(stage)
                found += training("check").check(stage, encoder, open_pictures=open_pictures)
        for one in found:
            for line in one.lines():
                output.line(line)
        output.result({"sets": [one.as_json() for one in found]})
        bad = [one.name for one in found if not one.sound]
        if bad:
            raise InputError(f"{len(bad)} of {len(found)} data sets cannot be trained on: {', '.join(bad)}")

    raise typer.Exit(run(action, output))


def fix_ocrvqa(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of OCR-VQA's pictures.")],
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    output = Output(as_json, quiet, verbose, "data fix-ocrvqa")

    def action() -> None:
        from llava_convert.core.resources import training

        copied, there = training("check").fix_ocrvqa(folder)
        output.line(f"{folder}: {copied:,} pictures copied to .jpg, {there:,} had one")
        output.result({"copied": copied, "there": there})

    raise typer.Exit(run(action, output))
