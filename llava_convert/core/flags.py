"""Options as fields of dataclasses: each is described once, for the command line, for Python and for messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llava_convert.core.errors import not_a_choice
from llava_convert.core.values import dataclass

AUTO = "auto"  # the word for what None says: the default

# Panels of `--help`, in the order in which they stand there. A panel for one target alone is named by its layouts.
SOURCE, OUTPUT, RUN, PUBLISH, CHECKS = "Source", "Output", "Run", "Publish", "Checks and safety"
PANELS = (SOURCE, OUTPUT, RUN, PUBLISH, CHECKS)


@dataclass(frozen=True)
class Flag:
    """How an option is told on the command line; it stands in the annotation of the option's field.

    `choices` are all the words that it takes, in any case; `others` maps further words to them. `offers` are words
    that TAB offers where there are more. `spelling` is the flag, where it is not made of the field's name; `short` is
    its letter. It may be given several times where it is `repeated`. An `argument` stands without a flag.
    """

    help: str
    panel: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    offers: tuple[str, ...] = ()
    spelling: str | None = None
    short: str | None = None
    repeated: bool = False
    argument: bool = False

    def chosen(self, flag: str, value: Any) -> Any:
        """The choice that a word means. Raises UsageError, which lists them."""
        word = str(value).strip().casefold()
        word = self.others.get(word, word)
        if word not in self.choices:
            raise not_a_choice(flag, value, self.choices)
        return word


@dataclass(frozen=True)
class Option:
    """A field that is an option: its name in Python, its Flag, the types that it takes, and its default."""

    name: str
    flag: Flag
    types: tuple[type, ...]
    default: Any

    @property
    def spelling(self) -> str:
        """`--dtype`; of an argument its metavar."""
        if self.flag.argument:
            return self.flag.metavar or self.name.upper()
        return self.flag.spelling or "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.types == (bool,)


def options_of(kind: Any) -> Mapping[str, Option]:
    """The options among the fields of a dataclass, by name, in their order."""
    return _options_of(kind)


@cache
def _options_of(kind: Any) -> Mapping[str, Option]:
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for one in fields(kind):
        for flag in getattr(hints[one.name], "__metadata__", ()):
            if isinstance(flag, Flag):
                bare = get_args(hints[one.name])[0]
                types = tuple(t for t in (get_args(bare) or (bare,)) if t is not type(None))
                found[one.name] = Option(one.name, flag, types, one.default)
    return found


@dataclass(frozen=True)
class Flagged:
    """A dataclass whose options are given as people write them, and held as they are called here.

    `auto` is held as None, and a word as the choice that it means. Raises UsageError for a word that is none.
    """

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():
            value = getattr(self, name)
            if type(value) is int and str in option.types:
                object.__setattr__(self, name, str(value))
            elif isinstance(value, str) and value.strip().casefold() == AUTO:
                object.__setattr__(self, name, None)
            elif option.flag.choices and value is not None:
                object.__setattr__(self, name, option.flag.chosen(option.spelling, value))


def in_keywords(options: Iterable[Option]) -> Callable[[str], str]:
    """What puts the flags in a message into the words of Python: `--dtype fp16` becomes `dtype='fp16'`.

    A whole command between backticks stays.
    """
    known = {option.spelling: option for option in options if not option.flag.argument}
    known |= {option.flag.short: option for option in known.values() if option.flag.short}
    pattern = re.compile(
        r"`llava-convert [^`]*`|(?<![\w-])(?P<flag>" + "|".join(sorted(known, key=len, reverse=True)) + r")(?![\w-])"
        r"(?: (?P<value>[^\s,;()`]+))?"
    )

    def keyword(found: re.Match[str]) -> str:
        if found["flag"] is None:
            return found[0]
        option, value = known[found["flag"]], found["value"]
        if option.is_switch:
            return f"{option.name}=True" + (f" {value}" if value is not None else "")
        if value is None:
            return option.name
        word = value.removesuffix(":")
        if word in _metavars(option.flag):
            return f"{option.name}={value}"
        if word != value or word in option.flag.choices:
            said = word if re.fullmatch(r"-?\d+", word) else repr(word)
            return f"{option.name}={said}{value.removeprefix(word)}"
        return f"{option.name} {value}"

    return lambda text: pattern.sub(keyword, text)


def _metavars(flag: Flag) -> set[str]:
    words = {flag.metavar or "", *re.split(r"[|,]", flag.metavar or "")}
    return {word for word in words if word.isupper() or "." in word}


def as_names(value: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    """One name, or several."""
    if value is None:
        return ()
    return (str(value),) if isinstance(value, str | Path) else tuple(map(str, value))


def as_path(value: str | Path | None) -> Path | None:
    """A path as a shell takes it: `~` and `~user` at its start are home folders, where there is such a user."""
    if value is None:
        return None
    with suppress(RuntimeError):  # no such user
        return Path(value).expanduser()
    return Path(value)
