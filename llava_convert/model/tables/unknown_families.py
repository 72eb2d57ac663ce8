"""Families that no table has, as data (`mappings/unknown_families.toml`): how a checkpoint shows that it is of one."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.patterns import Pattern, TableError, of_one_layer


@dataclass(frozen=True)
class UnknownFamily:
    """One row. `what` is the family with its article; `tensors` and `ids` are patterns of names."""

    part: str
    what: str
    tensors: tuple[str, ...]
    ids: tuple[str, ...] = ()


def parse_unknown_families(text: str, path: Path) -> tuple[UnknownFamily, ...]:
    """A table's rows. Raises TableError for a row without a name or patterns, or of a part that no family has."""
    parts = {table.part for table in architectures().values()}
    found = []
    for row in tomllib.loads(text)["family"]:
        if row.get("part") not in parts or not row.get("is") or not row.get("tensors"):
            raise TableError(f"{path.name}: a family lacks its part, its name or its tensors: {row}")
        found.append(UnknownFamily(row["part"], row["is"], tuple(row["tensors"]), tuple(row.get("ids", ()))))
    return tuple(found)


@cache
def unknown_families() -> tuple[UnknownFamily, ...]:
    """The rows of `mappings/unknown_families.toml`."""
    path = data_dir("mappings") / "unknown_families.toml"
    return parse_unknown_families(path.read_text(encoding="utf-8"), path)


def by_tensors(part: str, names: Iterable[str]) -> str | None:
    """What a part is by names of its tensors, None where a table has them or no row fits.

    `names` are canonical, or as they are on disk where no layout's table gives them a meaning.
    """
    there = sorted(of_one_layer(names))
    rows = (row for row in unknown_families() if row.part == part)
    return next((r.what for r in rows if any(_fits(r.tensors, one) and not _known(part, one) for one in there)), None)


def _known(part: str, name: str) -> bool:
    """Whether a family that has a table has a tensor of this name."""
    tables = [table for table in architectures().values() if table.part == part]
    return any(Pattern.parse(f"{part}.{row['name']}").match(name) for table in tables for row in table.rows)


def by_id(part: str, name: str) -> str | None:
    """What a base model is by its hub id or its folder's name, None where no row fits."""
    rows = (row for row in unknown_families() if row.part == part)
    return next((row.what for row in rows if _fits(row.ids, name.lower())), None)


def _fits(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
