"""Names on disk ↔ canonical names, by tables which are data (`mappings/layouts/*.toml`).

A row pairs two patterns. A pattern is a dotted name whose segments are literals or placeholders: `{x}` stands
for exactly one segment, `{x...}` for one or more. Both sides of a row hold the same placeholders, so that
every row works in both directions. Tables are checked when they are loaded: patterns that could both
match one name are refused, so the order of rows never decides what a name means; it only says in which
order the target's modules come.

A layout does not know what a family calls its tensors. A row that holds a role stands for one row for each family of
language models: `{module}` is an outermost module of it (`model`, `lm_head`), `{head}` the one that holds the head,
`{body}` one of the others with what lies next in it (`model.layers`), and `{inner}` that without what all begin with.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.resources import data_dir
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.model.tables.added import ARCHITECTURE, LAYOUT, AddedTable, added_tables
from llava_convert.model.tables.families import Architecture, architectures
from llava_convert.model.tables.patterns import Pattern, TableError

_ROLES = ("{module}", "{head}", "{body}", "{inner}")


DISK, CANONICAL = "disk", "canonical"
ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Fused:
    """How one tensor on the side `whole` is several on the other: rows of a table with `parts`, one for each.

    `groups` is the shape symbol that counts the groups of rows, or ROWS: the parts stand one after another. `shares`
    are symbols too: how much of a group each part has, in proportion. `index` is that of this row's part.
    """

    whole: str
    index: int
    groups: str
    shares: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One pair of patterns; `dialect` names the variant of the layout which uses it.

    `place` is its number in the table, which rows that were made of one share. `heads` is the shape symbol that counts
    the heads whose rows are reordered on the way to disk, `plus` what is added to every weight there, `omit` why a
    tensor is not written at all.
    """

    disk: Pattern
    canonical: Pattern
    dialect: str
    line: int
    place: int
    fused: Fused | None = None
    heads: str = ""
    plus: float = 0.0
    omit: str = ""

    def pattern(self, side: str) -> Pattern:
        return self.disk if side == DISK else self.canonical

    def one_of(self, side: str) -> bool:
        """Whether it is the row by which the table's patterns of that side are told apart: the first of `parts`."""
        return self.fused is None or self.fused.whole != side or self.fused.index == 0


@dataclass(frozen=True, slots=True)
class Drop:
    """A name on disk that is left behind, and why."""

    disk: Pattern
    reason: str


@dataclass(frozen=True, slots=True)
class Named:
    """What a name on disk means."""

    canonical: str
    dialect: str


@dataclass(frozen=True)
class LayoutTable:
    """A layout's names. `writes` is the dialect that our own output uses."""

    name: str
    path: Path
    writes: str
    rows: tuple[Row, ...]
    drops: tuple[Drop, ...] = ()

    def candidates(self, name: str, side: str) -> tuple[Row, ...]:
        """The rows that could take a name, in their order: so a table's hundreds are not tried for each name."""
        rows = self._by_module[side]
        return rows.get(("", *name.split("."))[-2], rows[""])

    @cached_property
    def _by_module(self) -> dict[str, dict[str, tuple[Row, ...]]]:
        """By side, then by the module that a name is of: the rows of that module and of any; under "" those of any."""
        found: dict[str, dict[str, tuple[Row, ...]]] = {}
        for side in (DISK, CANONICAL):
            modules = [row.pattern(side).module for row in self.rows]
            found[side] = {
                one: tuple(row for row, module in zip(self.rows, modules, strict=True) if module in (one, ""))
                for one in {"", *modules}
            }
        return found

    def read(self, disk: str) -> Named | None:
        """The canonical name of `disk`, or None when no row knows it."""
        for row in self.candidates(disk, DISK):
            bindings = row.disk.match(disk)
            if bindings is not None:
                return Named(row.canonical.fill(bindings), row.dialect)
        return None

    def named(self, name: str, side: str) -> list[tuple[str, Row]]:
        """What a name on one side is called on the other, by each row that takes it: several where it is in parts."""
        found = ((row.pattern(side).match(name), row) for row in self.candidates(name, side))
        other = CANONICAL if side == DISK else DISK
        return [(row.pattern(other).fill(bindings), row) for bindings, row in found if bindings is not None]

    def dropped(self, disk: str) -> str | None:
        """Why `disk` is left behind, or None when it is not."""
        return next((drop.reason for drop in self.drops if drop.disk.match(disk) is not None), None)

    def write(self, canonical: str, dialects: Iterable[str] = ()) -> tuple[str, int] | None:
        """The name on disk of `canonical` and the place of the row which gave it (the module order).

        In the first of `dialects` that has one; without these in the one that our own output uses.
        """
        for dialect in dialects or (self.writes,):
            for row in self.candidates(canonical, CANONICAL):
                if row.dialect == dialect and (bindings := row.canonical.match(canonical)) is not None:
                    return row.disk.fill(bindings), row.place
        return None

    def nearest(self, disk: str, known: Iterable[str] = ()) -> str:
        """The known name or row nearest to an unknown name, with the table's line: for an error's text."""
        close = get_close_matches(disk, list(known), n=1, cutoff=0.6)
        if close:
            return f"nearest known name: {close[0]}"
        texts = {row.disk.text: row.line for row in self.rows}
        close = get_close_matches(disk, list(texts), n=1, cutoff=0.0)
        return f"nearest row: {close[0]} ({self.path.name} line {texts[close[0]]})" if close else ""


def parse_layout_table(text: str, path: Path, families: Iterable[Architecture] = ()) -> LayoutTable:
    """Parse and check one table, as `make_layout_table` does."""
    return make_layout_table(tomllib.loads(text), text, path, families)


def make_layout_table(
    raw: Mapping[str, Any], text: str, path: Path, families: Iterable[Architecture] = ()
) -> LayoutTable:
    """The table of what a file's `text` says. Raises TableError when rows overlap or cannot be inverted.

    `families` are what rows with a role stand for.
    """
    lines = text.splitlines()
    families = tuple(families)
    every = [pair for family in families for pair in _roles(family)]
    # A family that is written as another here was never saved in an older dialect.
    held = [pair for family in families if raw["layout"] not in family.written_as for pair in _roles(family)]
    rows: list[Row] = []
    for place, entry in enumerate(raw["row"]):
        for pair, fused in _pairs(entry, path):
            line = next((n for n, content in enumerate(lines, 1) if f'"{pair[DISK]}"' in content), 0)
            unknown = {pair["op"]} - {"rope"} if "op" in pair else set()
            if unknown:
                raise TableError(f"{path.name}: unknown op {sorted(unknown)}")
            roles = every if entry.get("dialect", raw["writes"]) == raw["writes"] else held
            for disk_text, canonical_text in _expanded(pair[DISK], pair[CANONICAL], roles):
                disk, canonical = Pattern.parse(disk_text), Pattern.parse(canonical_text)
                dialect = entry.get("dialect", raw["writes"])
                if any((disk, canonical) == (row.disk, row.canonical) and dialect != row.dialect for row in rows):
                    continue  # a family whose names two dialects write alike
                if disk.placeholders != canonical.placeholders:
                    raise TableError(f"{path.name}: {disk.text} and {canonical.text} hold different placeholders")
                more = {key: pair[key] for key in ("heads", "plus", "omit") if key in pair}
                rows.append(Row(disk, canonical, dialect, line, place, fused, **more))
    drops = tuple(Drop(Pattern.parse(entry["disk"]), entry["reason"]) for entry in raw.get("drop", ()))
    if raw["writes"] not in {row.dialect for row in rows}:
        raise TableError(f"{path.name}: `writes` names the dialect {raw['writes']!r}, but no row has it")
    _refuse_overlaps(path.name, [row.disk for row in rows if row.one_of(DISK)] + [drop.disk for drop in drops])
    for dialect in {row.dialect for row in rows}:
        named = [row.canonical for row in rows if row.dialect == dialect and row.one_of(CANONICAL)]
        _refuse_overlaps(f"{path.name} ({dialect})", named)
    return LayoutTable(raw["layout"], path, raw["writes"], tuple(rows), drops)


def _pairs(entry: Mapping[str, Any], path: Path) -> Iterable[tuple[dict[str, Any], Fused | None]]:
    """An entry of a table as pairs of names: one, or with `parts` one for each."""
    if "parts" not in entry:
        yield dict(entry), None
        return
    whole = DISK if DISK in entry else CANONICAL
    if len({DISK, CANONICAL} & entry.keys()) != 1 or "join" not in entry or len(entry["parts"]) < 2:
        raise TableError(f"{path.name}: a row with parts needs one name, at least two parts, and `join`")
    shares = tuple(part.get("share", ROWS) for part in entry["parts"])
    for index, part in enumerate(entry["parts"]):
        yield {whole: entry[whole], **part}, Fused(whole, index, entry["join"], shares)


def _roles(family: Architecture) -> Iterable[dict[str, str]]:
    """What the placeholders of roles stand for in one family, one set for each of its outermost modules."""
    head = family.head.removeprefix(f"{family.part}.").rpartition(".")[0]
    body = [module for module in family.modules if module != head]
    first = {module.partition(".")[0] for module in body}
    shared = f"{min(first)}." if len(first) == 1 else ""
    yield {"{module}": head.partition(".")[0], "{head}": head}
    for module in body:
        yield {"{module}": module.partition(".")[0], "{body}": module, "{inner}": module.removeprefix(shared)}


def _expanded(disk: str, canonical: str, roles: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The rows that one with roles stands for, else itself; none for a name that families mean different things by."""
    held = {role for role in _ROLES if role in disk + canonical}
    if not held:
        return [(disk, canonical)]
    found: dict[str, set[str]] = {}
    for values in roles:
        if held <= values.keys():
            pair = [disk, canonical]
            for role, value in values.items():
                pair = [text.replace(role, value) for text in pair]
            found.setdefault(pair[0], set()).add(pair[1])
    return [(name, min(meant)) for name, meant in found.items() if len(meant) == 1]


def _refuse_overlaps(where: str, patterns: list[Pattern]) -> None:
    for i, one in enumerate(patterns):
        for other in patterns[:i]:
            if one.overlaps(other):
                raise TableError(f"{where}: {other.text} and {one.text} can match the same name")


def layout_table(name: str, family: str | None = None) -> LayoutTable:
    """The table of `mappings/layouts/<name>.toml`, for all families of language models or for the one of that name.

    A layout that calls the head otherwise than its family does is read by the table of that family alone. Rows that the
    user added to this job follow ours. Raises InputError where these contradict ours.
    """
    added = tuple(table for table in added_tables(LAYOUT) if table.raw[LAYOUT] == name)
    return _layout_table(name, family, added, added_tables(ARCHITECTURE))


@cache
def _layout_table(
    name: str, family: str | None, added: tuple[AddedTable, ...], families_added: tuple[AddedTable, ...]
) -> LayoutTable:
    path = data_dir("mappings") / "layouts" / f"{name}.toml"
    families = [a for a in architectures().values() if a.embedding and family in (None, a.name)]
    text = path.read_text(encoding="utf-8")
    table = parse_layout_table(text, path, families)
    if added:
        raw = tomllib.loads(text)
        for one in added:
            raw = {**raw, **{key: [*raw.get(key, ()), *one.raw.get(key, ())] for key in ("row", "drop")}}
        try:
            table = make_layout_table(raw, text, path, families)
        except TableError as problem:
            where = ", ".join(str(one.path) for one in added)
            raise InputError(f"{where}: {problem}", hint="fix the table; ours are in mappings/layouts") from None
    if any(row.fused or row.heads for row in table.rows):
        raise TableError(f"{path.name}: parts and heads are allowed only in the table of a family")
    return table


def grouped(names: Iterable[str], *, limit: int = 12) -> str:
    """Names for an error's text: integers that only differ by position become `{0…31}`, at most `limit` lines.

    >>> grouped(["layers.0.a", "layers.1.a", "b"])
    'b, layers.{0…1}.a'
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 20]
        if numbers:
            at = numbers[0]
            key = (*parts[:at], "", *parts[at + 1 :])
            groups.setdefault(key, []).append(int(parts[at]))
        else:
            groups.setdefault((name,), [])
    texts = sorted(_group_text(key, numbers) for key, numbers in groups.items())
    shown = texts[:limit]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f", and {more} more kinds" if more else "")


def _group_text(key: tuple[str, ...], numbers: list[int]) -> str:
    if not numbers:
        return printable(key[0])
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        text = str(numbers[0])
    elif len(numbers) == numbers[-1] - numbers[0] + 1:
        text = f"{{{numbers[0]}…{numbers[-1]}}}"
    else:
        text = "{" + ",".join(map(str, numbers[:8])) + (",…" if len(numbers) > 8 else "") + "}"
    return printable(".".join(part if part else text for part in key))


def lookup_errors(names: Mapping[str, str], table: LayoutTable, known: Iterable[str] = ()) -> str:
    """One sentence for names that no row takes: grouped, with the nearest known name of the first."""
    first = next(iter(names))
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} that nothing takes: {grouped(names)}; " + table.nearest(
        first, known
    )
