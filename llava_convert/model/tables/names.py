"""Names on disk ↔ canonical names, by tables which are data (`mappings/layouts/*.toml`).

A row pairs two patterns. A pattern is a dotted name whose segments are literals or placeholders: `{x}` stands
for exactly one segment, `{x...}` for one or more. Both sides of a row hold the same placeholders, so that
every row works in both directions. Tables are checked when they are loaded: patterns that could both
match one name are refused, so the order of rows never decides what a name means; it only says in which
order the target's modules come.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from llava_convert.core.resources import data_dir
from llava_convert.core.text import printable

Bindings = dict[str, str]
_SEGMENT = re.compile(r"[^{}*]+|\{\w+\*?\}")


class TableError(Exception):
    """A mapping table contradicts itself: our bug, found when the table is loaded."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One dotted name with placeholders."""

    text: str
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        # The rest placeholder holds dots of its own: shield them from the split.
        segments = tuple(text.replace("...}", "*}").split("."))
        rests = [s for s in segments if s.endswith("*}")]
        names = [s.strip("{}*") for s in segments if s.startswith("{")]
        # A brace inside a segment would be taken for a literal, and match nothing.
        whole = all(_SEGMENT.fullmatch(s) for s in segments)
        if len(rests) > 1 or len(set(names)) != len(names) or not whole:
            raise TableError(f"bad pattern {text!r}")
        return cls(text, segments)

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(s for s in self.segments if s.startswith("{"))

    def match(self, name: str) -> Bindings | None:
        """What each placeholder stands for in `name`, or None if it is another name."""
        parts = name.split(".")
        return _match(self.segments, parts)

    def fill(self, bindings: Bindings) -> str:
        return ".".join(bindings[s] if s.startswith("{") else s for s in self.segments)

    def overlaps(self, other: Pattern) -> bool:
        """Whether some name matches both."""
        return _overlap(self.segments, other.segments)


def _match(segments: tuple[str, ...], parts: list[str]) -> Bindings | None:
    rest = next((i for i, s in enumerate(segments) if s.endswith("*}")), None)
    if rest is None:
        if len(parts) != len(segments):
            return None
        pairs = list(zip(segments, parts, strict=True))
    else:
        tail = len(segments) - rest - 1
        if len(parts) < len(segments):
            return None
        middle = ".".join(parts[rest : len(parts) - tail])
        pairs = [*zip(segments[:rest], parts, strict=False), (segments[rest], middle)]
        pairs += zip(segments[rest + 1 :], parts[len(parts) - tail :], strict=True)
    bindings: Bindings = {}
    for segment, part in pairs:
        if segment.startswith("{"):
            bindings[segment] = part
        elif segment != part:
            return None
    return bindings


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    if not a or not b:
        return not a and not b
    if a[0].endswith("*}") or b[0].endswith("*}"):
        if not a[0].endswith("*}"):
            a, b = b, a
        # One rest swallows one segment or more of the other: try each length.
        return any(_overlap(a[1:], b[n:]) for n in range(1, len(b) + 1)) or (
            b[0].endswith("*}") and any(_overlap(a[n:], b[1:]) for n in range(1, len(a) + 1))
        )
    if a[0].startswith("{") or b[0].startswith("{") or a[0] == b[0]:
        return _overlap(a[1:], b[1:])
    return False


@dataclass(frozen=True, slots=True)
class Row:
    """One pair of patterns; `dialect` names the variant of the layout which uses it."""

    disk: Pattern
    canonical: Pattern
    dialect: str
    line: int


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

    def read(self, disk: str) -> Named | None:
        """The canonical name of `disk`, or None when no row knows it."""
        for row in self.rows:
            bindings = row.disk.match(disk)
            if bindings is not None:
                return Named(row.canonical.fill(bindings), row.dialect)
        return None

    def dropped(self, disk: str) -> str | None:
        """Why `disk` is left behind, or None when it is not."""
        return next((drop.reason for drop in self.drops if drop.disk.match(disk) is not None), None)

    def write(self, canonical: str) -> tuple[str, int] | None:
        """The name on disk of `canonical` and the number of the row which gave it (the module order)."""
        for number, row in enumerate(self.rows):
            if row.dialect == self.writes:
                bindings = row.canonical.match(canonical)
                if bindings is not None:
                    return row.disk.fill(bindings), number
        return None

    def nearest(self, disk: str, known: Iterable[str] = ()) -> str:
        """The known name or row nearest to an unknown name, with the table's line: for an error's text."""
        close = get_close_matches(disk, list(known), n=1, cutoff=0.6)
        if close:
            return f"nearest known name: {close[0]}"
        texts = {row.disk.text: row.line for row in self.rows}
        close = get_close_matches(disk, list(texts), n=1, cutoff=0.0)
        return f"nearest row: {close[0]} ({self.path.name} line {texts[close[0]]})" if close else ""


def parse_layout_table(text: str, path: Path, **stated: str) -> LayoutTable:
    """Parse and check one table. Raises TableError when rows overlap or cannot be inverted.

    `stated` gives `layout` and `writes` where the text does not.
    """
    raw = {**tomllib.loads(text), **stated}
    lines = text.splitlines()
    rows: list[Row] = []
    for entry in raw["row"]:
        disk, canonical = Pattern.parse(entry["disk"]), Pattern.parse(entry["canonical"])
        if disk.placeholders != canonical.placeholders:
            raise TableError(f"{path.name}: {disk.text} and {canonical.text} hold different placeholders")
        quoted = f'"{disk.text}"'
        line = next((n for n, content in enumerate(lines, 1) if quoted in content), 0)
        rows.append(Row(disk, canonical, entry.get("dialect", raw["writes"]), line))
    drops = tuple(Drop(Pattern.parse(entry["disk"]), entry["reason"]) for entry in raw.get("drop", ()))
    if raw["writes"] not in {row.dialect for row in rows}:
        raise TableError(f"{path.name}: no row is of the dialect {raw['writes']!r} that it writes")
    _refuse_overlaps(path.name, [row.disk for row in rows] + [drop.disk for drop in drops])
    for dialect in {row.dialect for row in rows}:
        _refuse_overlaps(f"{path.name} ({dialect})", [row.canonical for row in rows if row.dialect == dialect])
    return LayoutTable(raw["layout"], path, raw["writes"], tuple(rows), drops)


def _refuse_overlaps(where: str, patterns: list[Pattern]) -> None:
    for i, one in enumerate(patterns):
        for other in patterns[:i]:
            if one.overlaps(other):
                raise TableError(f"{where}: {other.text} and {one.text} can match the same name")


@cache
def layout_table(name: str) -> LayoutTable:
    """The table of `mappings/layouts/<name>.toml`."""
    path = data_dir("mappings") / "layouts" / f"{name}.toml"
    return parse_layout_table(path.read_text(encoding="utf-8"), path)


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
