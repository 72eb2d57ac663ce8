"""docs/cli.md out of the commands themselves: `python -m tests.docs.cli_page` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_convert.cli._commands import COMMANDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = """\
# Commands

Each command with what its `--help` says; `make docs` makes this page of it. All of them take `--json`, `--quiet` and
`--verbose`. What a command prints for programs is [on a page of its own](json.md), [exit codes](errors.md) too.
"""
TALK = {"as_json", "quiet", "verbose"}


def page() -> str:
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield HEAD
    yield from _commands({name: one.whole(name) for name, one in COMMANDS.items()}, "llava-convert")


def _commands(commands: Mapping[str, Any], within: str) -> Iterator[str]:
    for name, command in commands.items():
        path = f"{within} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command.commands, path)
        else:
            yield from _command(command, path)


def _command(command: Any, path: str) -> Iterator[str]:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name not in TALK | {"help"}]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    yield f"## {path.removeprefix('llava-convert ')}\n"
    yield f"`{' '.join([path, *(_metavar(p) for p in arguments), '[OPTIONS]'])}`\n"
    yield _text(command.help) + "\n"
    panel = ""
    rows = [p for p in shown if p not in arguments]
    for i, one in enumerate(rows):
        title = one.rich_help_panel or "Options"
        if i == 0 or title != panel:
            panel = title
            yield f"{'' if i == 0 else chr(10)}| {panel} | |\n|---|---|"
        yield f"| {_flags(one)} | {_text(one.help).replace('|', chr(92) + '|')} |"
    yield ""


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper()).strip("{}[]")


def _flags(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    value = "" if option.is_flag or option.metavar is None else f" `{option.metavar}`"
    return (names + value).replace("|", "\\|")


def _text(text: str | None) -> str:
    """Help as Markdown: paragraphs on one line each, no markup of the terminal's."""
    paragraphs = re.split(r"\n\s*\n", (text or "").replace("\b", "").strip())
    plain = re.sub(r"\[/?[a-z]+\]", "", "\n\n".join(" ".join(p.split()) for p in paragraphs))
    return plain.replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
