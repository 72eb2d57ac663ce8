"""Facts as data (`mappings/facts/*.toml`): what decides how a model computes, is prompted or stops.

`llava.toml` holds the facts about how the parts work together, with each layout's word for them, if it has one. The
other tables sort the keys of one kind of file: those that decide, and those that decide nothing, each with the reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass
from llava_convert.model.tables import pinpoints
from llava_convert.model.tables.patterns import TableError

FORMS = {
    "width, height": (pinpoints.read, pinpoints.kept),
    "height, width": (pinpoints.swapped, pinpoints.swapped),
}
KINDS = ("computes", "prompts", "stops", "samples", "describes")
CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Word:
    """How one layout states a fact.

    `key` of `file` holds it, `default` is what readers take where the key is absent; it is written where its value is
    another, or `always`. `words` are the layout's own names of values. Without a key only the values in `unsaid` can go
    there, for the reason `why`. `type` is that of an entry of metadata. `silent`: the layout says nothing of it, its
    readers are told. `note` is for the documentation.

    `means` is the one value that every model of the layout has, said by its class. `begins` is how the values that can
    be stated begin. `form` names how the layout writes the value. `loses`: another value is told of and not refused.
    """

    key: str | None = None
    file: str = CONFIG
    default: Any = None
    always: bool = False
    words: Mapping[str, Any] = field(default_factory=dict)
    unsaid: tuple[Any, ...] = ()
    why: str = ""
    type: str = ""
    silent: bool = False
    note: str = ""
    means: Any = None
    begins: str = ""
    form: str = ""
    loses: str = ""

    def value(self, word: Any) -> Any:
        """The value of a layout's word. Raises KeyError for a word that it does not have."""
        if self.form:
            return FORMS[self.form][0](word)
        if self.begins and not str(word).startswith(self.begins):
            raise KeyError(word)
        return self.words[str(word)] if self.words else word

    def word(self, value: Any) -> Any:
        """The layout's word for a value. Raises KeyError where it has none."""
        if self.form:
            return FORMS[self.form][1](value)
        if not self.words:
            return value
        found = next((word for word, meant in self.words.items() if meant == value), None)
        if found is None:
            raise KeyError(value)
        return found

    def can_state(self, value: Any) -> bool:
        """Whether the layout can hold a model of which the fact is `value`."""
        if self.key is None:
            return self.silent or value in self.unsaid
        if self.begins:
            return str(value).startswith(self.begins)
        return not self.words or value in self.words.values()


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. `layouts` has a word for each layout that cares; `when`: the fact without which it means nothing."""

    name: str
    kind: str
    what: str
    default: Any
    when: tuple[str, Any] | None
    layouts: Mapping[str, Word]

    def matters(self, facts: Mapping[str, Any]) -> bool:
        """Whether the fact means anything beside the others."""
        if self.when is None:
            return True
        name, wanted = self.when
        value = facts.get(name)
        return value.startswith(wanted) if isinstance(wanted, str) and isinstance(value, str) else value == wanted


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of one kind of file: the `kinds` of those that decide, the reasons why others are `harmless`.

    A `*` in a harmless key stands for anything. `files` are patterns of the files that the table is about, in one
    `layout` or in all.
    """

    name: str
    kinds: Mapping[str, str]
    harmless: Mapping[str, str]
    files: tuple[str, ...] = ()
    layout: str | None = None

    def kind(self, key: str) -> str | None:
        """The kind of a key that decides, None for any other."""
        return self.kinds.get(key)

    def reason(self, key: str) -> str | None:
        """Why a key decides nothing, None where none is known."""
        if key in self.harmless:
            return self.harmless[key]
        return next(
            (reason for known, reason in self.harmless.items() if "*" in known and fnmatchcase(key, known)), None
        )

    def knows(self, key: str) -> bool:
        return key in self.kinds or self.reason(key) is not None


@cache
def fact_tables() -> Mapping[str, Mapping[str, Any]]:
    """Every table of `mappings/facts` as TOML has it, by the file's stem."""
    paths = sorted((data_dir("mappings") / "facts").glob("*.toml"))
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in paths}


@cache
def facts() -> Mapping[str, Fact]:
    """The facts of `llava.toml`, by name. Raises TableError for a table that contradicts itself."""
    found: dict[str, Fact] = {}
    for entry in fact_tables()["llava"]["fact"]:
        fact = _fact(entry)
        if fact.name in found or fact.kind not in KINDS:
            raise TableError(f"llava.toml: {fact.name} is listed twice, or its kind {fact.kind!r} is unknown")
        found[fact.name] = fact
    for fact in found.values():
        if fact.when is not None and fact.when[0] not in found:
            raise TableError(f"llava.toml: {fact.name} depends on {fact.when[0]}, which is not a fact")
    return found


def _fact(entry: Mapping[str, Any]) -> Fact:
    plain = {"name", "kind", "what", "default", "when"}
    default = entry.get("default")
    absent = (None,) if default is None else ()
    layouts = {
        name: Word(
            **{
                "default": default,
                **word,
                "unsaid": (*word.get("unsaid", (word["means"],) if "means" in word else ()), *absent),
            }
        )
        for name, word in entry.items()
        if name not in plain
    }
    for layout, names in fact_tables()["llava"]["dialects"].items():
        if layout in layouts:
            layouts |= {name: layouts.get(name, layouts[layout]) for name in names}
    when = next(iter(entry["when"].items())) if "when" in entry else None
    return Fact(entry["name"], entry["kind"], entry["what"], default, when, layouts)


def dialects(layout: str) -> tuple[str, ...]:
    """By which names facts are stated in a layout: its own, and those of its other classes of models."""
    return (layout, *fact_tables()["llava"]["dialects"].get(layout, ()))


@cache
def key_table(name: str) -> KeyTable:
    """The table `mappings/facts/<name>.toml`. Raises TableError where a key has two meanings."""
    raw = fact_tables()[name]
    kinds: dict[str, str] = {}
    for kind in KINDS:
        for key in raw.get(kind, ()):
            if key in kinds:
                raise TableError(f"{name}.toml: {key} is of two kinds")
            kinds[key] = kind
    harmless = {key: reason for reason, keys in raw.get("harmless", {}).items() for key in keys}
    table = KeyTable(name, kinds, harmless, tuple(raw.get("files", ())), raw.get("layout"))
    twice = [key for key in kinds if table.reason(key) is not None]
    if twice:
        raise TableError(f"{name}.toml: {twice[0]} is listed both as deciding something and as harmless")
    return table


def tables_of(layout: str, file: str) -> list[KeyTable]:
    """The tables about a file of a layout."""
    tables = (key_table(name) for name in fact_tables() if name != "llava")
    return [t for t in tables if t.layout in (None, layout) and any(fnmatchcase(file, known) for known in t.files)]


def stated_in(layout: str, file: str = CONFIG) -> dict[str, Fact]:
    """The facts that a layout states in a file, by key."""
    return {
        word.key: fact
        for fact in facts().values()
        if (word := fact.layouts.get(layout)) is not None and word.key is not None and word.file == file
    }


def unknown_keys(config: Mapping[str, Any], tables: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Keys of a config that no table has and that say something: null, false, 0 and what is empty say nothing."""
    named = frozenset(known)
    looked = [key_table(name) for name in tables]
    return sorted(
        key for key, value in config.items() if value and key not in named and not any(t.knows(key) for t in looked)
    )
