"""Commands made of jobs: their flags, the panels of their help, and what TAB offers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llava_convert.cli._errors import run
from llava_convert.cli._output import Output
from llava_convert.core.flags import PANELS, RUN, Option, options_of
from llava_convert.layouts.info import TARGETS, writing

TALK_PANEL = "Talk"
_NARROW = 26  # what fits beside the longest flag in 80 columns

J = TypeVar("J")
Command = Callable[..., None]
"""What a command does, with the signature that typer reads."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=TALK_PANEL)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.", rich_help_panel=TALK_PANEL)
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print every detail, and tracebacks with errors.", rich_help_panel=TALK_PANEL),
]
_TALK = {"as_json": Json, "quiet": Quiet, "verbose": Verbose}


def command(
    name: str,
    job: Callable[..., J],
    action: Callable[[J, Output], None],
    *,
    hidden: Collection[str] = (),
    **given: Any,
) -> Command:
    """The function of a command: it does a job, and prints what came of it.

    typer reads its signature, which is made of the job's options. `hidden` ones are taken and not shown: who gives one
    is told where it belongs. `given` are fields that the command itself says. `name` is the command's in `--json`.
    """

    def called(as_json: bool, quiet: bool, verbose: bool, **asked: Any) -> None:
        output = Output(as_json, quiet, verbose, name)

        def act() -> None:
            from llava_convert.storage.output.signals import interrupt_on_sigterm

            with interrupt_on_sigterm():
                action(job(**asked, **given), output)

        raise typer.Exit(run(act, output))

    options = sorted(options_of(job).values(), key=_place)
    annotations = {o.name: Annotated[_kind(o), _told(o, hidden=o.name in hidden)] for o in options} | _TALK
    defaults = {o.name: Parameter.empty if o.default is MISSING else _default(o) for o in options}
    called.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults.get(name, False), annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    called.__annotations__ = dict(annotations)
    return called


def offered(*values: str) -> Callable[[str], list[str]]:
    """What TAB offers of these words."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete.lower())]


def shown(*choices: str) -> str:
    """Choices as typer shows its own, which would refuse other words of the same meaning.

    Many have spaces between them, so that a narrow terminal breaks the line there.
    """
    text = "|".join(choices)
    return f"[{text if len(text) <= _NARROW else ' | '.join(choices)}]"


def _told(option: Option, *, hidden: bool) -> Any:
    flag = option.flag
    # readable=False: whether a path can be read is told by what reads it, with its exit code.
    if flag.argument:
        return typer.Argument(metavar=option.spelling, help=flag.help, readable=False)
    words = flag.choices or flag.offers
    return typer.Option(
        *filter(None, (flag.short, option.spelling)),
        metavar=shown(*flag.choices) if flag.choices else flag.metavar,
        autocompletion=offered(*words) if words else None,
        help=flag.help,
        rich_help_panel=_panel(option),
        hidden=hidden,
        readable=False,
    )


def _panel(option: Option) -> str | None:
    """An option that shapes the output of some targets alone stands in a panel of theirs."""
    targets = _targets(option)
    if targets and len(targets) < len(TARGETS):
        return f"Output: {', '.join(targets)}"
    return option.flag.panel


def _place(option: Option) -> tuple[bool, bool, int, int]:
    """Where an option stands: arguments, then panel by panel; what is for some targets alone after the rest.

    An argument that is repeated takes all words that are left.
    """
    panel, targets = option.flag.panel, _targets(option)
    return (
        not option.flag.argument,
        option.flag.argument and option.flag.repeated,
        PANELS.index(panel) + 1 if panel in PANELS else 0,
        list(TARGETS).index(targets[0]) + 1 if 0 < len(targets) < len(TARGETS) else 0,
    )


def _targets(option: Option) -> tuple[str, ...]:
    """The targets whose output an option shapes; none where a job that writes no layout has one of that name."""
    return () if option.flag.panel == RUN else writing(option.name)


def _kind(option: Option) -> Any:
    """The type that typer reads: a switch, a count, a path, or words."""
    if option.flag.repeated:
        return list[str] if option.flag.argument else list[str] | None
    kind = Path if Path in option.types else option.types[0] if option.types in ((bool,), (int,)) else str
    return kind | None if option.default is None else kind


def _default(option: Option) -> Any:
    return None if option.flag.repeated else option.default
