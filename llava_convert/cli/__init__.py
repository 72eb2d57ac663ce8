"""The command line. Nothing heavy is imported before a command runs: `--help` must be instant."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from llava_convert.cli._commands import COMMANDS, Unread
from llava_convert.cli._output import Output
from llava_convert.cli._typed import as_typed

# The base of click's usage errors, by whichever copy of click typer has: it exports one of them.
_UsageProblem: Any = typer.BadParameter.__base__
_USAGE = 2


class _Group(TyperGroup):
    """The commands. What cannot be parsed is printed as every other error is, with --json too."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **named: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **named)
        try:
            code = super().main(args, standalone_mode=False, **named)
        except _UsageProblem as problem:
            given = sys.argv[1:] if args is None else args
            _tell(problem, as_json="--json" in given)
            code = _USAGE
        sys.exit(code or 0)


def _tell(problem: Any, *, as_json: bool) -> None:
    if not (message := problem.format_message()):
        return  # no argument at all: the help was printed
    where = problem.ctx.command_path if problem.ctx is not None else "llava-convert"
    Output(as_json=as_json).error(message, f"`{where} --help` lists arguments and options", _USAGE)


app = typer.Typer(
    name="llava-convert",
    cls=_Group,
    help="Convert LLaVA checkpoints from any layout to any other, exactly.",
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
        as_typed(typer.main.get_command(app))(prog_name="llava-convert")
    finally:
        gc.freeze()  # Python looks once more as it ends: 0.04 s for an inspection, 0.17 s with a large vocabulary


def _forgiving_streams() -> None:
    """Print anywhere: what the terminal's encoding lacks is escaped, what goes to a closed stream is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # it stays open as long as the process
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
