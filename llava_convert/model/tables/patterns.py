"""Dotted names with placeholders: what they match, what they make, and whether two could match one name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llava_convert.core.values import dataclass

Bindings = dict[str, str]
_SEGMENT = re.compile(r"[^{}*]+|\{\w+\*?\}")
_NUMBER = re.compile(r"\.\d+(?=\.)")


class TableError(Exception):
    """A mapping table contradicts itself: our bug, found when the table is loaded."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One dotted name with placeholders: `head` is its text before the first, `tail` that behind the last."""

    text: str
    segments: tuple[str, ...]
    head: str
    tail: str

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
        return cls(text, segments, text.partition("{")[0], text.rpartition("}")[2])

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(s for s in self.segments if s.startswith("{"))

    def match(self, name: str) -> Bindings | None:
        """What each placeholder stands for in `name`, or None if it is another name."""
        if not (name.startswith(self.head) and name.endswith(self.tail)):  # nearly all that are asked are another name
            return None
        return _match(self.segments, name.split("."))

    @property
    def module(self) -> str:
        """The last segment but one, which every name that it matches has; "" where that is not literal."""
        module, last = ("", *self.segments)[-2:]
        return "" if module.startswith("{") or last.endswith("*}") else module

    def fill(self, bindings: Bindings) -> str:
        return ".".join(bindings[s] if s.startswith("{") else s for s in self.segments)

    def overlaps(self, other: Pattern) -> bool:
        """Whether some name matches both."""
        if not (self.tail.endswith(other.tail) or other.tail.endswith(self.tail)):
            return False
        return _overlap(self.segments, other.segments)


def of_one_layer(names: Iterable[str]) -> set[str]:
    """Names as if a model had one layer: a tenth of them, where only their kinds count."""
    return {_NUMBER.sub(".0", name) for name in names}


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
