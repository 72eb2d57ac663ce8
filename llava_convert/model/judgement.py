"""What a comparison of two models' facts found, and when two values of a config mean the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from llava_convert.core.values import dataclass
from llava_convert.model.tables.facts import KeyTable

_ABSENT: tuple[Any, ...] = (None, False, "", [], {}, ())


@dataclass(frozen=True, slots=True)
class FactDifference:
    """A fact that differs, with both values; None where a side does not state it."""

    source: Any
    out: Any


@dataclass
class Judgement:
    """What was found so far.

    `different` by fact, `alike` the values of both sides where they are equal; `harmless` says why keys that differ do
    not matter; `not_compared` what OUT cannot tell.
    """

    different: dict[str, FactDifference] = field(default_factory=dict)
    alike: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    def differ(self, name: str, source: Any, out: Any) -> None:
        self.different.setdefault(name, FactDifference(source, out))

    def agree(self, name: str, source: Any, out: Any) -> None:
        """Keep the values of a fact that is equal, unless both sides say nothing."""
        if source is not None or out is not None:
            self.alike.setdefault(name, (source, out))

    def compare(self, name: str, source: Any, out: Any) -> None:
        if alike(source, out):
            self.agree(name, source, out)
        else:
            self.differ(name, source, out)

    def compare_keys(
        self, prefix: str, tables: Iterable[KeyTable], source: Mapping[str, Any], out: Mapping[str, Any]
    ) -> None:
        """Compare the keys of two files of one kind. A key that no table knows counts as one that decides."""
        looked = tuple(tables)
        for key in sorted(source.keys() | out.keys()):
            mine, theirs = source.get(key), out.get(key)
            kind = next((kind for table in looked if (kind := table.kind(key)) is not None), None)
            reason = next((why for table in looked if (why := table.reason(key)) is not None), None)
            if alike(mine, theirs) or (key == "eos_token_id" and _ids(mine) == _ids(theirs)):
                if reason is None or kind is not None:
                    self.agree(f"{prefix}{key}", mine, theirs)
            elif kind == "samples":
                self.harmless[f"{prefix}{key}"] = "how a token is chosen where nobody says it"
            elif reason is None or kind is not None:
                self.differ(f"{prefix}{key}", mine, theirs)
            else:
                self.harmless[f"{prefix}{key}"] = reason


def alike(one: Any, other: Any) -> bool:
    """Whether two values mean the same: null, false and what is empty are one, 1 and 1.0 too."""
    if _says_nothing(one) or _says_nothing(other):
        return _says_nothing(one) and _says_nothing(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(alike(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    same_kind = type(one) is type(other) or (_is_number(one) and _is_number(other))
    return bool(same_kind and one == other)


def _says_nothing(value: Any) -> bool:
    return any(value is empty or (type(value) is type(empty) and value == empty) for empty in _ABSENT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any) -> set[Any]:
    """Stop ids, whichever way they are spelled: their order does not matter."""
    return set(value) if isinstance(value, list) else {value}
