"""The command line. Nothing heavy is imported before a command runs: `--help` must be instant."""

from __future__ import annotations

import gc
import os
import sys
from io import TextIOWrapper
from pathlib import Path

import typer

from llava_convert.cli._commands import COMMANDS, Unread
from llava_convert.cli._output import Output

app = typer.Typer(
    name="llava-convert",
    help="Convert LLaVA checkpoints between every layout in use, exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        from llava_convert._version import __version__

        typer.echo(f"llava-convert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _unread() -> None:
    """What a command does until its module is imported."""


for _name, _one in COMMANDS.items():
    app.command(_name, cls=Unread, help=_one.help, rich_help_panel=_one.panel)(_unread)


def main() -> None:
    """Entry point of the `llava-convert` command."""
    _forgiving_streams()
    # A command lives for seconds and makes a million objects (a tokenizer's merges) but hardly a cycle: to look for
    # them took a fifth of a small conversion.
    gc.disable()
    try:
        app()
    except SystemExit as stop:
        _tell_in_json(stop)
        raise


def _tell_in_json(stop: SystemExit) -> None:
    """Print a usage error as the object that other errors are with --json: it is found before a command runs."""
    message = getattr(stop.__context__, "format_message", None)
    if "--json" in sys.argv and isinstance(stop.code, int) and stop.code and message is not None:
        Output(as_json=True).result(
            {"error": message(), "hint": "--help lists the options", "exit_code": stop.code},
        )


def _forgiving_streams() -> None:
    """Print anywhere: what the terminal's encoding lacks is escaped, what goes to a closed stream is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # it stays open as long as the process
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
