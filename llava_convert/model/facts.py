"""Facts of one model: read from a layout's config, held against what another layout can state, written in its words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.text import listed, printable
from llava_convert.model.tables.facts import CONFIG, Fact, dialects, facts, stated_in, unknown_keys

Facts = Mapping[str, Any]
LAYER, STRATEGY, ASPECT = "vision.feature_layer", "vision.feature_strategy", "picture.aspect_ratio"
ACTIVATION, BIAS, DEPTH = "projector.activation", "projector.bias", "projector.depth"
TEMPLATE = "prompt.chat_template"
CLASS_TOKEN = "vision.class_token"
PINPOINTS, MERGE, NEWLINE = "picture.grid_pinpoints", "picture.patch_merge", "picture.newline"


def read_facts(layout: str, config: Mapping[str, Any], where: str, *, file: str = CONFIG) -> dict[str, Any]:
    """The facts that a file of a layout states, by name, those that it leaves to its readers' defaults among them.

    `layout` may be one of its dialects. Raises UnsupportedError (exit 4) for a word that no reader of it knows.
    """
    found: dict[str, Any] = {}
    for fact in facts().values() if file == CONFIG else ():
        implied = fact.layouts[layout].means if layout in fact.layouts else None
        if implied not in (None, fact.default):
            found[fact.name] = implied
    for key, fact in stated_in(layout, file).items():
        word = fact.layouts[layout]
        said = config.get(key)
        try:
            value = word.value(word.default if said is None else said)
        except KeyError:
            raise UnsupportedError(
                f"{where}: {key} is {printable(str(said))[:60]!r}, which no reader knows ({fact.what})",
                hint=f"known: {listed(list(word.words))}" if word.words else None,
            ) from None
        if said is not None or value != fact.default:
            found[fact.name] = value
    return found


def value_of(said: Facts, name: str) -> Any:
    """A fact's value: as it is said, else the default."""
    return said[name] if name in said else facts()[name].default


def words_of(layout: str, said: Facts, *, file: str = CONFIG) -> dict[str, Any]:
    """The keys of a layout's file that state the facts. What the layout cannot state is left out: see `unsayable`."""
    found: dict[str, Any] = {}
    for key, fact in stated_in(layout, file).items():
        word, value = fact.layouts[layout], value_of(said, fact.name)
        if not word.can_state(value):
            continue
        spelled = word.word(value) if value is not None else None
        if word.always or (value is not None and spelled != word.default):
            found[key] = spelled
    return found


def dialect_for(layout: str, said: Facts, *, about: Iterable[str] = ("",)) -> str:
    """The dialect of a layout that can state all facts; else that which can state the most, in their order."""
    wanted, order = tuple(about), list(facts())

    def reach(dialect: str) -> int:
        lacking = unsayable(dialect, said, about=wanted)
        return order.index(lacking[0].name) if lacking else len(order)

    return max(dialects(layout), key=reach)


def lost(layout: str, said: Facts) -> list[str]:
    """What a dialect computes otherwise in a use that it is not refused for."""
    found = []
    for fact in facts().values():
        word = fact.layouts.get(layout)
        if word is not None and word.loses and fact.matters(said) and not word.can_state(value_of(said, fact.name)):
            found.append(f"{fact.what} is {spelled(value_of(said, fact.name))}: {word.loses}")
    return found


def unsayable(layout: str, said: Facts, *, about: Iterable[str] = ("",)) -> list[Fact]:
    """The facts that matter and that a dialect cannot state at their values, of names beginning with one of `about`."""
    wanted = tuple(about)
    return [
        fact
        for fact in facts().values()
        if fact.name.startswith(wanted)
        and fact.matters(said)
        and (word := fact.layouts.get(layout)) is not None
        and not word.can_state(value_of(said, fact.name))
        and not word.loses
    ]


def refuse_unsayable(
    source: str, layout: str, said: Facts, layouts: Iterable[str], *, about: Iterable[str] = ("",)
) -> None:
    """Raise UnsupportedError (exit 4) for a fact that the target `layout` cannot state, naming which of `layouts` can.

    `source` is the layout whose key the message names.
    """
    dialect = dialect_for(layout, said, about=about)
    for fact in unsayable(dialect, said, about=about):
        value = value_of(said, fact.name)
        able = [name for name in layouts if not unsayable(dialect_for(name, said, about=about), said, about=about)]
        why = fact.layouts[dialect].why
        raise UnsupportedError(
            f"{key_of(fact.name, source)} is {spelled(value)} ({fact.what}){_where(fact, source, said)}, which the "
            f"{layout} layout cannot hold" + (f": {why}" if why else ""),
            hint=f"convert to {' or '.join(able)}" if able else "no layout of this tool can hold it",
        )


def _where(fact: Fact, source: str, said: Facts) -> str:
    """The fact without which this one would mean nothing."""
    if fact.when is None:
        return ""
    name = fact.when[0]
    return f", where {key_of(name, source)} is {spelled(value_of(said, name))} ({facts()[name].what})"


def key_of(name: str, layout: str) -> str:
    """The key that states a fact in a layout; its own name where there is none."""
    word = facts()[name].layouts.get(layout)
    return name if word is None or word.key is None else word.key


def spelled(value: Any) -> str:
    """A value in a message."""
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_unknown_keys(
    config: Mapping[str, Any],
    tables: Iterable[str],
    where: str,
    *,
    known: Iterable[str] = (),
    allowed: Iterable[str] = (),
) -> None:
    """Raise UnsupportedError (exit 4) for keys that no table has: nobody knows what they decide."""
    unknown = [key for key in unknown_keys(config, tables, known) if key not in frozenset(allowed)]
    if not unknown:
        return
    shown = listed([f"{printable(key)} = {spelled(config[key])}" for key in unknown])
    raise UnsupportedError(
        f"{where}: no table knows {shown}, so it would be lost",
        hint=" ".join(f"--allow-key {printable(key)}" for key in unknown[:6])
        + (" goes on without it" if len(unknown) == 1 else " goes on without them"),
    )
