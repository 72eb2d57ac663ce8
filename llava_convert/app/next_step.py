"""What to do with an output first: a line of Python, or a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.quickstarts import filled
from llava_convert.app.card.words import Words
from llava_convert.app.options import Options, SourceOptions
from llava_convert.core.flags import options_of
from llava_convert.layouts.info import LAYOUTS
from llava_convert.model.checkpoint import LLM, PART_WORDS, VISION
from llava_convert.model.options import DROP

_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)(?: ([^\s,;:)`]+))?")


# A Path keeps one of the slashes of an address; `C:/` is a drive.
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):/(?=[^/])")


def typed(source: str | Path) -> str:
    """A source as a command names it: an address has its two slashes again."""
    return _ADDRESS.sub(lambda found: f"{found[1]}:{'///' if found[1] == 'file' else '//'}", str(source))


def next_step(facts: Facts, source: str, options: Options, *, here: bool) -> str:
    """How to try an output in the program that was asked for, else in the one that loads it first.

    To compare it, where nothing here can load it. `facts` name it by its path, or its URL.
    """
    text = facts.card.next_in.get((options.asked or "").strip().lower(), facts.card.next)
    if text is not None and here and not facts.adapter:
        return filled(text, Words(facts))
    return shlex.join(["llava-convert", "verify", source, facts.name, *flags_of(options)])


def flags_of(options: SourceOptions) -> Iterator[str]:
    """The options without which the source could not be read again as it was, as words of a command."""
    bases = options.bases
    given = {
        "--config": options.config,
        "--config-from": options.config_from,
        "--mmproj": options.mmproj,
        "--pretrained-pth": options.pretrained_pth,
        "--base": options.base,
        "--projector": options.projector,
        f"--{PART_WORDS[LLM]}": bases.llm,
        f"--{PART_WORDS[VISION]}": bases.visual_encoder,
        "--lora-alpha": _alpha(bases.lora_alpha),
        "--vocab": options.vocab,
        "--extra": options.extra if options.extra == DROP else None,
    }
    for flag, value in given.items():
        if value is not None:
            yield from (flag, str(value))
    for table in options.tables:
        yield from ("--table", str(table))
    for adapter in options.adapters:
        yield from ("--adapter", adapter)


def to_try(source: str, targets: Mapping[str, str | None], options: SourceOptions) -> str:
    """The conversion of a source to type next: to the layout that most programs load of those that can be made.

    `targets` says of each layout why it cannot be made, None where it can. Where none can, the command has the option
    that the first reason names; without one it looks at another model.
    """
    order = sorted(targets, key=lambda to: -len(LAYOUTS[to].loaders))
    words = ["llava-convert", "convert", source, *flags_of(options), "--to"]
    for to in order:
        if targets[to] is None:
            return shlex.join([*words, to])
    for to in order:
        if (lacking := _option_in(targets[to] or "", words)) is not None:
            return shlex.join([*words, to]) + f" {lacking}"
    return "llava-convert inspect MODEL"


def _option_in(text: str, given: Iterable[str]) -> str | None:
    """The first option of a conversion that a text names, with its value, or what stands for one; None for none.

    Options that follow it at once are taken as well: they are needed together.
    """
    known = {option.spelling: option.flag for option in options_of(Options).values()}
    for match in _OPTION.finditer(text):
        flag = known.get(match[1])
        is_choice = match[2] in (*flag.choices, "none") if flag is not None else False
        if flag is None or match[1] in given or (flag.choices and not is_choice):
            continue
        if flag.metavar is None and not flag.choices:
            return match[1]
        named = is_choice or "/" in (match[2] or "")  # a word of the option, or the path that the reason speaks of
        value = match[2] if named else (flag.metavar or "VALUE").split("|")[0]
        more = _option_in(text[match.end() :], given) if text.startswith(" --", match.end()) else None
        return f"{match[1]} {value}" + (f" {more}" if more else "")
    return None


def _alpha(given: Mapping[str, float]) -> str | None:
    return ",".join(f"{part}={value}" for part, value in given.items()) or None
