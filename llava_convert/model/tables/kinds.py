"""Kinds of things that lie where a model is looked for, as data (`mappings/kinds.toml`).

A row says how a kind is recognised, what it is, what it can be used for and what to type next. Rows stand from the
particular to the general: the first whose conditions all hold is meant.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.tables.patterns import TableError

FOLDER, FILE = "folder", "file"
# What a row's texts may name: the thing, the folder that it lies in, what was found within it, its model type or class.
_WORDS = frozenset({"path", "parent", "inner", "model"})


class Evidence(Protocol):
    """What a path shows of itself. What it has not, or what cannot be read, is empty."""

    @property
    def place(self) -> str:
        """`folder` or `file`."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """The names in a folder."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The object in a folder's config.json, or in a file of JSON."""
        ...

    @property
    def item(self) -> Mapping[str, Any]:
        """The first object of a file with a list of them."""
        ...

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the tensors of a file, or of the files in a folder."""
        ...

    @property
    def pickled(self) -> frozenset[str]:
        """The keys of what torch.save wrote, and the names of the classes in it."""
        ...

    @property
    def objects(self) -> frozenset[str]:
        """The name of the class of the one object that torch.save wrote, where it is no dict."""
        ...

    @property
    def start(self) -> bytes:
        """The first bytes of a file."""
        ...

    @property
    def suffix(self) -> str:
        """The end of a file's name, in lower case."""
        ...

    def newest(self, pattern: str) -> str | None:
        """The entry of a folder that matches and has the highest number, else the one changed last."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """One row. `what`, `use` and `next` are texts in which `{path}` and its like are to be filled in.

    `weights`: a file of weights, which is a model once the config of its model lies beside it.
    """

    name: str
    what: str
    use: str
    next: str
    when: Mapping[str, tuple[str, ...]]
    line: int
    weights: bool = False

    def fits(self, seen: Evidence) -> bool:
        return all(_CONDITIONS[name](seen, values) for name, values in self.when.items())

    @property
    def inner(self) -> str | None:
        """The pattern of what is looked for in a folder."""
        return self.when["inner"][0] if "inner" in self.when else None


def _any(names: Iterable[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _each(names: Iterable[str], patterns: tuple[str, ...]) -> bool:
    every = tuple(names)
    return all(_any(every, (pattern,)) for pattern in patterns)


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    found = config.get("architectures")
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _begins(start: bytes, values: tuple[str, ...]) -> bool:
    """Whether bytes begin with one of these, each a text of Latin-1 that may begin with `@` and its offset."""
    for value in values:
        at = re.match(r"@(\d+):", value)
        offset = int(at[1]) if at else 0
        wanted = value[at.end() if at else 0 :].encode("latin-1")
        if start[offset : offset + len(wanted)] == wanted:
            return True
    return False


# Every condition that a row may have: what it is about, and how its values are held against that.
_CONDITIONS: Mapping[str, Callable[[Evidence, tuple[str, ...]], bool]] = {
    "place": lambda seen, values: seen.place in values,
    "model_type": lambda seen, values: _any([str(seen.config.get("model_type"))], values),
    "class": lambda seen, values: _any(_classes(seen.config), values),
    "family": lambda seen, values: any(known_architecture(part, seen.config.get("model_type")) for part in values),
    "config": lambda seen, values: all(key in seen.config for key in values),
    "item": lambda seen, values: bool(seen.item) and any(key in seen.item for key in values),
    "holds": lambda seen, values: _each(seen.names, values),
    "holds_one": lambda seen, values: _any(seen.names, values),
    "lacks": lambda seen, values: not _any(seen.names, values),
    "tensors": lambda seen, values: bool(seen.tensors) and _each(seen.tensors, values),
    "one_tensor": lambda seen, values: _any(seen.tensors, values),
    "lacks_tensors": lambda seen, values: not _any(seen.tensors, values),
    "pickled": lambda seen, values: bool(seen.pickled) and _each(seen.pickled, values),
    "objects": lambda seen, values: bool(seen.objects) and _each(seen.objects, values),
    "starts": lambda seen, values: _begins(seen.start, values),
    "suffix": lambda seen, values: seen.suffix in values,
    "not_suffix": lambda seen, values: seen.suffix not in values,
    "inner": lambda seen, values: seen.newest(values[0]) is not None,
}


def parse_kinds(text: str, path: Path) -> tuple[Kind, ...]:
    """A table's rows. Raises TableError for a row without conditions or texts, and for what no row can say."""
    lines = text.splitlines()
    found: list[Kind] = []
    for entry in tomllib.loads(text)["kind"]:
        name = entry.get("name", "")
        line = next((n for n, content in enumerate(lines, 1) if content == f'name = "{name}"'), 0)
        when = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in entry["when"].items()}
        unknown = when.keys() - _CONDITIONS.keys()
        if unknown or not when.keys() - {"place"} or not all(when.values()):
            raise TableError(f"{path.name} line {line}: {name} has no condition, or one that is not known: {unknown}")
        texts = {key: entry.get(key, "") for key in ("is", "use", "next")}
        words = {word for value in texts.values() for word in re.findall(r"\{(\w+)\}", value)}
        if not all(texts.values()) or not words <= _WORDS or ("inner" in words) > ("inner" in when):
            raise TableError(f"{path.name} line {line}: {name} lacks a text, or names what is not known")
        if name in {one.name for one in found}:
            raise TableError(f"{path.name} line {line}: {name} is listed twice")
        found.append(Kind(name, texts["is"], texts["use"], texts["next"], when, line, entry.get("weights", False)))
    return tuple(found)


@cache
def kinds() -> tuple[Kind, ...]:
    """The rows of `mappings/kinds.toml`."""
    path = data_dir("mappings") / "kinds.toml"
    return parse_kinds(path.read_text(encoding="utf-8"), path)
