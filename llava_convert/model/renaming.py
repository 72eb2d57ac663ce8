"""Recipes under the names of another table, joined and parted where it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.model.recipe import Recipe, joined_recipe
from llava_convert.model.tables.names import DISK, ROWS, Fused, LayoutTable, Row
from llava_convert.ops.base import Op
from llava_convert.ops.join import Part, parts, shares
from llava_convert.ops.rows import Plus, RopePermute

Symbol = Callable[[str], int]
"""The value of a shape symbol in the model's config."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """A recipe under its new name. `old` is the name that it had; of a part that of the whole with its number.

    `members` are those that it was joined of, by their old names.
    """

    name: str
    old: str
    recipe: Recipe
    members: tuple[tuple[str, Recipe], ...] = ()


def renamed(recipes: Mapping[str, Recipe], table: LayoutTable, symbol: Symbol, *, side: str) -> list[Renamed]:
    """The recipes named as on the other side of the table than `side`, in their order.

    Raises UnsupportedError (exit 4) for a name that no row has and rows that do not make up the groups, InputError
    (exit 3) where members of a join are missing.
    """
    found: list[Renamed] = []
    begun: dict[str, dict[int, tuple[str, Recipe]]] = {}
    for name, recipe in recipes.items():
        rows = table.named(name, side)
        if not rows:
            raise UnsupportedError(f"{table.name} has no name for {printable(name)}")
        for other, row in rows:
            fused = row.fused
            if fused is None:
                found.append(Renamed(other, name, recipe.then(*moves(row, symbol, side=side))))
            elif fused.whole == side:
                one = recipe.part(part_of(fused, recipe.shape, symbol))
                found.append(Renamed(other, piece(name, fused), one.then(*moves(row, symbol, side=side))))
            else:
                members = begun.setdefault(other, {})
                members[fused.index] = (name, recipe.then(*moves(row, symbol, side=side)))
                if len(members) == len(fused.shares):
                    done = tuple(members[i] for i in range(len(members)))
                    whole = joined_recipe([member for _, member in done], groups_of(fused, symbol))
                    found.append(Renamed(other, done[0][0], whole, done))
                    del begun[other]
    for other, members in begun.items():
        there = ", ".join(name for name, _ in members.values())
        raise InputError(f"{printable(other)} is joined of several tensors, of which there is only {there}")
    return found


def moves(row: Row, symbol: Symbol, *, side: str) -> tuple[Op, ...]:
    """What happens to the rows of a tensor that is named on `side` on its way to the other."""
    turned = (RopePermute(symbol(row.heads), back=side == DISK),) if row.heads else ()
    return (*turned, *((Plus(-row.plus if side == DISK else row.plus),) if row.plus else ()))


def piece(whole: str, fused: Fused) -> str:
    """What a part of a tensor is called where it has no name of its own."""
    return f"{whole}[{fused.index}]"


def groups_of(fused: Fused, symbol: Symbol) -> int:
    return 1 if fused.groups == ROWS else symbol(fused.groups)


def part_of(fused: Fused, shape: tuple[int, ...], symbol: Symbol) -> Part:
    """Which rows of the whole, of that shape, are this part's."""
    weights = [1 if share == ROWS else symbol(share) for share in fused.shares]
    groups = groups_of(fused, symbol)
    return parts(groups, shares(shape[0] if shape else 0, groups, weights))[fused.index]
