"""Every command: where it is made, and what `llava-convert --help` says of it.

A command's module is imported when the command is called. So `--help` reads a table, and a conversion does not read
the options of a training.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from llava_convert.cli._typed import as_typed
from llava_convert.layouts.info import LAYOUTS


class Command(NamedTuple):
    """`made(name)` of a module of this package is its function, or the `Typer` of its own commands."""

    module: str
    panel: str
    help: str

    def whole(self, name: str) -> Any:
        """The command with its options."""
        made = import_module(f"llava_convert.cli.{self.module}").made(name)
        app = typer.Typer(add_completion=False)  # the program has that, not each command
        if isinstance(made, typer.Typer):
            app.add_typer(made, name=name, help=self.help)
            group: Any = typer.main.get_command(app)
            return as_typed(group.commands[name])
        app.command(name, help=self.help)(made)
        return as_typed(typer.main.get_command(app))


COMMANDS = {
    **{
        name: Command("convert_command", "Convert", f"{info.help} Convert it to another layout.")
        for name, info in LAYOUTS.items()
    },
    "convert": Command("convert_command", "Convert", "Convert any of these. The layout is detected."),
    "merge": Command("convert_command", "Convert", "Merge adapters into a model of any layout."),
    "sweep": Command(
        "sweep_command",
        "Convert",
        "Convert every checkpoint that matches a pattern, once; --watch waits for new ones.",
    ),
    "inspect": Command(
        "inspect_command", "Look and check", "Show what a checkpoint is, what is missing and what it can become."
    ),
    "verify": Command(
        "verify_command",
        "Look and check",
        "Compare OUT with SOURCE, tensor by tensor. Any converter may have made OUT.",
    ),
    "doctor": Command(
        "doctor_command", "Look and check", "Find what would make a program fail on a folder, and fix it."
    ),
    "layouts": Command(
        "layouts_command",
        "Look and check",
        "List what this version knows: layouts, model families, types, prompt templates and recipes.",
    ),
    "chat": Command("chat_command", "Ask", "Ask a model of any layout about pictures."),
    "eval": Command("eval_command", "Ask", "Score a model of any layout."),
    "upload": Command(
        "upload_command",
        "Publish",
        "Upload a folder to Hugging Face or ModelScope, after checking it against its source.",
    ),
    "release": Command(
        "release_command", "Publish", "Convert a model to every layout and upload each to its own repository."
    ),
    "train": Command("train_command", "Train", "Train a LLaVA. Its checkpoints can be converted."),
    "data": Command("data_command", "Train", "Check and fix training data."),
}


class Unread(TyperCommand):
    """A command by its name and help alone: who calls it, or asks what it takes, gets the whole one."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return COMMANDS[self.name].whole(self.name).make_context(info_name, args, parent, **extra)
