"""What was typed, made paths and words without pydantic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def as_typed(command: Any) -> Any:
    """The command, which takes paths and words as they are from now on, as do those under it.

    typer asks pydantic for every option, also for those that nobody gave, and the import of pydantic takes longer than
    that of typer. There is nothing to coerce in a word, nor in a number that is an option's default. Numbers that were
    typed, and what is missing, are left to typer, and so is all where typer does not use pydantic.
    """
    params_of = command.get_params  # with --help and its like, which are made when they are asked for
    command.get_params = lambda ctx: [_taken(param) for param in params_of(ctx)]
    for under in getattr(command, "commands", {}).values():
        as_typed(under)
    return command


def _taken(param: Any) -> Any:
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if kind is not None and "process_value" not in vars(param):
        param.process_value = _process(param, kind, param.process_value)
    return param


def _process(param: Any, kind: Any, by_typer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    many = param.multiple or param.nargs == -1

    def process(ctx: Any, value: Any) -> Any:
        if param.required and not value:
            return by_typer(ctx, value)  # which says what is missing
        if value is None:
            value = () if many else None
        elif kind in (str, Path) and isinstance(value, str):
            value = kind(value)
        elif not (many and kind == list[str]) and type(value) is not kind:
            return by_typer(ctx, value)
        return value if param.callback is None else param.callback(ctx, param, value)

    return process
