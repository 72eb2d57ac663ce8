"""A language model in the names and shapes of another family that computes the same (`--as`).

How two families relate is the section `[as.<other>]` of one's table: rows that join or part tensors, and what a config
of the one may say that the other's class does not read. Names that no row has are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.errors import UnsupportedError, not_a_choice
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import LLM
from llava_convert.model.configs import family
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.renaming import renamed
from llava_convert.model.tables.families import Architecture, architectures
from llava_convert.model.tables.names import CANONICAL, DISK, LayoutTable, grouped, make_layout_table

Config = Mapping[str, Any]
_PREFIX = f"{LLM}."


@dataclass(frozen=True)
class Relation:
    """How a family is written as another. `side` is that of the rows on which the first one's names stand.

    `owner` is the family whose table says it; `filled` is what the other's config says where the first one's does not;
    `renamed` are the keys of the first one's that the other's has under other names.
    """

    rows: LayoutTable
    side: str
    owner: Architecture
    keys: tuple[Mapping[str, Any], ...]
    filled: Mapping[str, str]
    renamed: Mapping[str, str]


def family_named(word: str) -> Architecture:
    """The family of language models of that name. Raises UsageError."""
    known = {name: table for name, table in architectures().items() if table.embedding}
    if word.strip().lower() not in known:
        raise not_a_choice("--as", word, known)
    return known[word.strip().lower()]


def relation(own: Architecture, other: Architecture) -> Relation | None:
    """How the family is written as the other, None where no table says it."""
    for owner, side, partner in ((own, DISK, other), (other, CANONICAL, own)):
        raw = owner.sections.get("as", {}).get(partner.name)
        if raw is not None:
            filled = raw.get("back", {}) if side == CANONICAL else {}
            keys = raw.get("renamed", {})
            if side == CANONICAL:
                keys = {theirs: mine for mine, theirs in keys.items()}
            return Relation(_rows(raw, owner, partner), side, owner, tuple(raw.get("key", ())), filled, keys)
    return None


def _rows(raw: Mapping[str, Any], owner: Architecture, partner: Architecture) -> LayoutTable:
    """The rows with the owner's names on the side of the disk."""
    sides = {owner.name: DISK, partner.name: CANONICAL}

    def sided(entry: Mapping[str, Any]) -> dict[str, Any]:
        found = {sides.get(key, key): value for key, value in entry.items()}
        return found | {"parts": [sided(part) for part in found["parts"]]} if "parts" in found else found

    stated = {"layout": f"{owner.name} as {partner.name}", "writes": partner.name}
    text = owner.path.read_text(encoding="utf-8")
    return make_layout_table({**stated, "row": [sided(entry) for entry in raw.get("row", ())]}, text, owner.path)


def reshaped(model: Model, other: Architecture) -> Model:
    """The model with its language model written as that family.

    Raises UnsupportedError (exit 4) where no table relates the two, for what the config says and the other's class
    does not read, and for tensors that the other does not have.
    """
    before = model.configs[LLM]
    own = family(LLM, before)
    found = relation(own, other)
    if found is None:
        ways = [name for name, table in architectures().items() if table.embedding and relation(own, table)]
        raise UnsupportedError(
            f"a {own.name} cannot be written as {other.name}: no table says how",
            hint=f"a {own.name} can be written as {', '.join(ways)}" if ways else "leave --as out to keep the family",
        )
    config = _config(before, own, other, found)
    owner_config = before if found.owner is own else config
    recipes = {name.removeprefix(_PREFIX): recipe for name, recipe in model.part(LLM).items()}
    made = _renamed(recipes, found, owner_config)
    expected = [name.removeprefix(_PREFIX) for name in other.tensors(config)]
    strange = sorted(made.keys() ^ set(expected))
    if strange:
        raise UnsupportedError(f"a {own.name} and a {other.name} of this config differ by {grouped(strange)}")
    rest = {name: recipe for name, recipe in model.recipes.items() if not name.startswith(_PREFIX)}
    whole = {f"{_PREFIX}{name}": made[name] for name in expected} | rest
    return replace(
        model,
        recipes=whole,
        configs={**model.configs, LLM: config},
        notes=(*model.notes, f"the language model, a {own.name}, is written as {other.name}"),
    )


def _renamed(recipes: Mapping[str, Recipe], how: Relation, config: Config) -> dict[str, Recipe]:
    moved = {name: recipe for name, recipe in recipes.items() if how.rows.named(name, how.side)}
    kept = {name: recipe for name, recipe in recipes.items() if name not in moved}
    made = renamed(moved, how.rows, lambda symbol: how.owner.symbol(symbol, config), side=how.side)
    return kept | {one.name: one.recipe for one in made}


def _config(config: Config, own: Architecture, other: Architecture, how: Relation) -> dict[str, Any]:
    """The other family's config of the same model."""
    for rule in how.keys:
        value = config.get(rule["key"])
        if not _means_nothing(value, rule, config):
            raise UnsupportedError(
                f"a {own.name} with {rule['key']} {_short(value)} in its config cannot be written as {other.name}: "
                f"{other.kind} computes something else",
                hint="leave --as out to keep the family of the language model",
            )
    ruled = {rule["key"] for rule in how.keys}
    made = {how.renamed.get(key, key): value for key, value in config.items() if key not in ruled}
    for key, source in how.filled.items():
        made.setdefault(key, None if source == "null" else config.get(source))
    return other.complete({**made, "model_type": other.model_types[0]})


def _means_nothing(value: Any, rule: Mapping[str, Any], config: Config) -> bool:
    """Whether the model computes the same without the key."""
    if value is None or "unread" in rule:
        return True
    if "reaches" in rule:
        limit = config.get(rule["reaches"])
        return isinstance(value, int) and isinstance(limit, int) and value >= limit
    if isinstance(value, Mapping):  # a rope scaling, by its kind
        value = value.get("rope_type", value.get("type"))
    return value in rule["values"]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("rope_type", value.get("type"))
    return str(value)[:60]
