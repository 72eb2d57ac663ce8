"""A user's own tables (`--table FILE.toml`), for as long as one job runs.

A table is one of three: a layout's (`layout` and `row`), whose rows are added to those of the layout; a family's
(`architecture` and `tensor`), as in `mappings/architectures`; or the model types by which a fork of LLaVA calls a
family that is known (`architecture` and `forks`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.values import dataclass
from llava_convert.storage.files import read_file

_MOST_BYTES = 4 << 20
LAYOUT, ARCHITECTURE = "layout", "architecture"


@dataclass(frozen=True, slots=True)
class AddedTable:
    """One table's text, and where it is from."""

    path: Path
    text: str

    @property
    def raw(self) -> Mapping[str, Any]:
        return tomllib.loads(self.text)


_ADDED: ContextVar[tuple[AddedTable, ...]] = ContextVar("tables", default=())


def added_tables(kind: str) -> tuple[AddedTable, ...]:
    """The tables of a kind (LAYOUT or ARCHITECTURE) that the running job was given."""
    return tuple(table for table in _ADDED.get() if kind in table.raw)


@contextmanager
def tables_added(paths: Iterable[Path]) -> Iterator[None]:
    """Read these tables for the time of the block. Raises InputError (exit 3) for one that is not what it must be."""
    found = tuple(_read(path) for path in paths)
    token = _ADDED.set(found) if found else None
    try:
        yield
    finally:
        if token is not None:
            _ADDED.reset(token)


def _read(path: Path) -> AddedTable:
    try:
        text = read_file(path, _MOST_BYTES).decode()
        raw = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise InputError(f"{path}: not TOML: {problem}", hint=_HINT) from None
    wrong = _problem(raw)
    if wrong is not None:
        raise InputError(f"{path}: {wrong}", hint=_HINT)
    return AddedTable(path, text)


_HINT = "a table is like those of mappings/layouts or mappings/architectures: docs/formats.md shows one"


def _problem(raw: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of a table; what its rows mean is checked where ours are."""
    kinds = [kind for kind in (LAYOUT, ARCHITECTURE) if kind in raw]
    if len(kinds) != 1 or not isinstance(raw[kinds[0]], str):
        return "it is the table of a `layout` or of an `architecture`, and names one"
    if kinds == [LAYOUT]:
        rows = raw.get("row", [])
        wanted = {"disk", "canonical"}
        if not _are_objects(rows) or not all(wanted <= row.keys() and _are_texts(row) for row in rows):
            return "each `row` has the texts `disk` and `canonical`"
        drops = raw.get("drop", [])
        if not _are_objects(drops) or not all({"disk", "reason"} <= row.keys() and _are_texts(row) for row in drops):
            return "each `drop` has the texts `disk` and `reason`"
        return None if rows or drops else "it has neither a `row` nor a `drop`"
    for key in ("model_types", "forks"):
        if not isinstance(raw.get(key, []), list) or not all(isinstance(word, str) for word in raw.get(key, [])):
            return f"`{key}` is a list of texts"
    tensors = raw.get("tensor")
    if tensors is None:
        return None if raw.get("forks") else "it has neither `tensor` nor `forks`"
    if not _are_objects(tensors) or not all(map(_is_tensor, tensors)):
        return "each `tensor` has a `name` and a `shape`"
    lacking = [key for key in ("part", "model_types") if not raw.get(key)]
    return f"it lacks `{lacking[0]}`" if lacking else None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _are_texts(row: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in row.values())


def _is_tensor(row: Mapping[str, Any]) -> bool:
    shape = row.get("shape")
    sound = isinstance(shape, list) and all(isinstance(one, str) or type(one) is int for one in shape)
    return sound and isinstance(row.get("name"), str)
