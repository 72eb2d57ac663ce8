"""Our dataclasses beside those of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import KW_ONLY, field
from typing import Any

import pytest

from llava_convert.core.values import dataclass

MAKERS: list[Callable[..., Any]] = [dataclasses.dataclass, dataclass]


def shapes(make: Callable[..., Any]) -> dict[str, Any]:
    """Classes of every kind that the package has, made by either decorator."""

    @make(frozen=True)
    class Row:
        name: str
        shape: tuple[int, ...] = (1, 2)
        told: int = field(default=0, compare=False)
        kept: dict[str, int] = field(default_factory=dict, repr=False, hash=False)

    @make(frozen=True, kw_only=True)
    class Named(Row):
        _: KW_ONLY
        more: int = 3

    @make(frozen=True, slots=True)
    class Slim:
        one: int

    @make
    class Plain:
        """With words of its own."""

        one: int = 1

    @make(frozen=True)
    class Empty:
        pass

    @make(frozen=True, eq=False)
    class Same:
        one: int = 1

    @make(frozen=True, repr=False)
    class Quiet:
        one: int = 1

        def __repr__(self) -> str:
            return "quiet"

    return {one.__name__: one for one in (Row, Named, Slim, Plain, Empty, Same, Quiet)}


def objects(of: dict[str, Any]) -> list[Any]:
    row = of["Row"]("a", kept={"x": 1})
    return [
        row,
        of["Row"]("a", told=5, kept={"x": 1}),
        of["Row"]("a", kept={"x": 2}),
        dataclasses.replace(row, name="b"),
        of["Named"](name="a", kept={"x": 1}),
        of["Named"](name="a", more=4, kept={"x": 1}),
        of["Slim"](1),
        of["Slim"](1),
        of["Slim"](2),
        copy.copy(of["Slim"](2)),
        of["Plain"](),
        of["Plain"](1),
        of["Empty"](),
        of["Empty"](),
        of["Same"](),
        of["Same"](),
        of["Quiet"](),
        of["Quiet"](2),
    ]


def told(of: dict[str, Any]) -> Any:
    """All that one sees of them."""
    made = objects(of)
    unhashable = [one for one in of.values() if one.__hash__ is None]
    hashable = [one for one in made if type(one) not in unhashable]
    return (
        [repr(one) for one in made if type(one).__name__ != "Same"],
        [[one == other for other in made] for one in made],
        [one.__name__ for one in unhashable],
        [[hash(one) == hash(other) for other in hashable] for one in hashable],
        [dataclasses.asdict(one) for one in made],
        [[f.name for f in dataclasses.fields(one)] for one in made],
        [hasattr(one, "__dict__") for one in made],
        of["Plain"].__doc__,
        of["Row"].__match_args__,
    )


def test_they_do_as_the_standard_ones() -> None:
    standard, ours = (told(shapes(make)) for make in MAKERS)
    assert ours == standard


def test_what_is_missing_or_too_much_is_refused() -> None:
    for make in MAKERS:
        of = shapes(make)
        for wrong in (
            lambda of=of: of["Row"](),
            lambda of=of: of["Slim"](1, 2),
            lambda of=of: of["Named"]("a", (1,), 0, {}, 4),
        ):
            with pytest.raises(TypeError):
                wrong()


@dataclass(frozen=True, slots=True)
class Carried:
    one: int
    two: str = "b"


def test_they_are_carried_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(Carried(1))) == Carried(1)


def test_one_that_compares_by_itself_keeps_its_own_way() -> None:
    @dataclass(frozen=True)
    class Folded:
        name: str

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Folded) and self.name.lower() == other.name.lower()

        def __hash__(self) -> int:
            return hash(self.name.lower())

    assert Folded("A") == Folded("a") and len({Folded("A"), Folded("a")}) == 1
