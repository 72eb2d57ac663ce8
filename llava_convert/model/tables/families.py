"""The tensors of one family, as data (`mappings/architectures/*.toml`).

A table lists every tensor of a model in module order, with its shape in symbols which the config gives. It
answers what a conversion must know before a byte moves: which names must be there, which may, of what
shape, and in which order they are written. Of a language model it also says which tensors play a role: the embedding
and the head, whatever they are called.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass
from llava_convert.model.tables.added import ARCHITECTURE, AddedTable, added_tables
from llava_convert.model.tables.patterns import Pattern, TableError

Config = Mapping[str, Any]

# Bounds what a hostile config can make us enumerate.
MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor which a model of this config has. `tied` names the tensor it may share its weights with."""

    shape: tuple[int, ...]
    tied: str | None
    line: int


@dataclass(frozen=True)
class Architecture:
    """One family's table. `part` is the prefix of its canonical names.

    `kind` is transformers' class of it. `embedding` and `head` are canonical names, "" where the part has none.
    `official` is the model type by which LLaVA's own code knows the family, "" where it has no class for it; `forks`
    are those by which other code derived from it does. `class_token`: the first feature of a tower is none of its
    patches. `written_as` are the families that it is written as in layouts that cannot hold its own. `sections` are the
    table's `[gguf]` and `[as]`.

    `scaling` is the one rope scaling that the family's class takes, where it takes no other field: its `type`, the
    `former_types` that mean the same, and its `fields`.
    """

    name: str
    part: str
    path: Path
    model_types: tuple[str, ...]
    kind: str
    embedding: str
    head: str
    official: str
    forks: tuple[str, ...]
    class_token: bool
    written_as: Mapping[str, str]
    defaults: Mapping[str, Any]
    symbols: Mapping[str, tuple[str, ...]]
    repeat: Mapping[str, Mapping[str, Any]]
    rows: tuple[Mapping[str, Any], ...]
    drops: tuple[tuple[Pattern, str], ...]
    scaling: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]

    def complete(self, config: Config) -> dict[str, Any]:
        """`config` with the family's defaults filled in: published configs keep only what differs."""
        return {**self.defaults, **config}

    def symbol(self, name: str, config: Config) -> int:
        """The value of a shape symbol: the first of its formulas whose config keys are all there.

        Raises InputError when none can be computed or a division leaves a rest.
        """
        for formula in self.symbols.get(name, (name,)):
            value = _formula(formula, config)
            if value is not None:
                return value
        raise InputError(f"the config of the {self.part.replace('_', ' ')} lacks {name!r} ({self.name} table)")

    def tensors(self, config: Config) -> dict[str, Expected]:
        """Canonical name → what must be there, in module order."""
        found: dict[str, Expected] = {}
        rows = list(self.rows)
        while rows:
            placeholder = next((p for p in self.repeat if f"{{{p}}}" in rows[0]["name"]), None)
            if placeholder is None:
                row = rows.pop(0)
                if _is_there(row, config):
                    name = f"{self.part}.{row['name']}"
                    tied = name == self.head and bool(config.get("tie_word_embeddings"))
                    found[name] = self._expected(row, config, tied=tied)
                continue
            # Rows of one repeated block stand together: emit them layer by layer, as modules do.
            block = []
            while rows and f"{{{placeholder}}}" in rows[0]["name"]:
                block.append(rows.pop(0))
            rule = self.repeat[placeholder]
            start, step = int(rule.get("start", 0)), int(rule.get("step", 1))
            count = self.symbol(rule["count"], config)
            if count > MOST_LAYERS:
                raise InputError(f"config: {rule['count']} is {count}, more than any model has ({MOST_LAYERS})")
            # The same in every block, so said once.
            there = [
                (f"{self.part}.{row['name']}".split(f"{{{placeholder}}}"), self._expected(row, config))
                for row in (block if count else ())
                if _is_there(row, config)
            ]
            for number in range(start, start + count * step, step):
                for around, expected in there:
                    found[str(number).join(around)] = expected
        return found

    def _expected(self, row: Mapping[str, Any], config: Config, *, tied: bool = False) -> Expected:
        shape = tuple(self._dimension(d, config) for d in row["shape"])
        return Expected(shape, self.embedding if tied else None, row["line"])

    def _dimension(self, formula: str | int, config: Config) -> int:
        if isinstance(formula, int):
            return formula
        value = 1
        for word in formula.split("*"):
            word = word.strip()
            value *= int(word) if word.isdigit() else self.symbol(word, config)
        return value

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The outermost modules that hold its tensors, in their order: two names deep, less the part.

        `model.layers` of `model.layers.{layer}.mlp.up_proj.weight`, `lm_head` of `lm_head.weight`.
        """
        found: dict[str, None] = {}
        for name in (*(row["name"] for row in self.rows), *self._dropped_names):
            fixed = name.split(".{")[0].split(".")
            found[".".join(fixed[:-1][:2] if len(fixed) == len(name.split(".")) else fixed[:2])] = None
        return tuple(found)

    @cached_property
    def _dropped_names(self) -> tuple[str, ...]:
        return tuple(pattern.text.removeprefix(f"{self.part}.") for pattern, _ in self.drops)

    def dropped(self, canonical: str) -> str | None:
        """Why a tensor of this name is left behind (old buffers), or None when it is not."""
        return next((reason for pattern, reason in self.drops if pattern.match(canonical) is not None), None)


def _is_there(row: Mapping[str, Any], config: Config) -> bool:
    """Whether a model of that config has the row's tensors."""
    when = row.get("when")
    return when is None or bool(config.get(when.removeprefix("not "))) != when.startswith("not ")


def _formula(formula: str, config: Config) -> int | None:
    """`a // b ** 2 + c`: strictly left to right over config keys and numbers; `/` must divide evenly.

    None when a key is absent.
    """
    words = formula.split()
    value: int | None = None
    for op, word in zip(["+", *words[1::2]], words[::2], strict=True):
        operand = int(word) if word.isdigit() else config.get(word)
        if operand is None:
            return None
        if isinstance(operand, bool) or not isinstance(operand, int) or not 0 <= operand < 2**32:
            raise InputError(f"config: {word!r} should be a count, found {operand!r}")
        if value is None:
            value = operand
        elif op == "+":
            value += operand
        elif op == "*":
            value *= operand
        elif op == "**":
            value = int(value**operand)
        else:
            if operand == 0 or (op == "/" and value % operand):
                raise InputError(f"config: {formula} does not divide evenly ({value} / {operand})")
            value //= operand
    return value


def parse_architecture(text: str, path: Path) -> Architecture:
    """One table. Raises TableError for a role that no row has, and for a language model without roles."""
    raw = tomllib.loads(text)
    lines = text.splitlines()
    names = {row["name"] for row in raw["tensor"]}
    roles = {role: raw.get(role, "") for role in ("embedding", "head")}
    for role, name in roles.items():
        if (name or raw["part"] == "language_model") and name not in names:
            raise TableError(f"{path.name}: no tensor is the {role} {name!r}")
    return Architecture(
        name=raw["architecture"],
        part=raw["part"],
        path=path,
        model_types=tuple(raw["model_types"]),
        kind=raw.get("class", ""),
        **{role: f"{raw['part']}.{name}" if name else "" for role, name in roles.items()},
        official=raw.get("official", ""),
        forks=tuple(raw.get("forks", ())),
        class_token=raw.get("class_token", False),
        written_as=raw.get("written_as", {}),
        defaults=raw.get("defaults", {}),
        symbols={k: tuple(v) for k, v in raw.get("symbols", {}).items()},
        repeat=raw.get("repeat", {}),
        rows=tuple({**row, "line": _line_of(row["name"], lines)} for row in raw["tensor"]),
        scaling=raw.get("rope_scaling", {}),
        drops=tuple((Pattern.parse(f"{raw['part']}.{d['name']}"), d["reason"]) for d in raw.get("drop", ())),
        sections={name: raw[name] for name in ("gguf", "as") if name in raw},
    )


def _line_of(name: str, lines: list[str]) -> int:
    quoted = f'name = "{name}"'
    return next((number for number, content in enumerate(lines, 1) if quoted in content), 0)


def architectures() -> dict[str, Architecture]:
    """Every table of `mappings/architectures`, by its own name, and those that the user added to this job."""
    return _architectures(added_tables(ARCHITECTURE))


@cache
def _architectures(added: tuple[AddedTable, ...]) -> dict[str, Architecture]:
    tables = {}
    for path in sorted((data_dir("mappings") / "architectures").glob("*.toml")):
        table = parse_architecture(path.read_text(encoding="utf-8"), path)
        tables[table.name] = table
    for one in added:
        try:
            _add(tables, one)
        except TableError as problem:
            raise InputError(f"{one.path}: {problem}", hint="ours are in mappings/architectures") from None
    return tables


def _add(tables: dict[str, Architecture], added: AddedTable) -> None:
    """Put a user's table among ours. Raises TableError for a model type that another family has."""
    raw = added.raw
    known = tables.get(raw["architecture"])
    if "tensor" in raw:
        if known is not None:
            raise TableError(f"{added.path.name}: there is a family {known.name}; give it another name")
        table = parse_architecture(added.text, added.path)
    elif known is None:
        raise TableError(f"{added.path.name}: no family is called {raw['architecture']}; known: {', '.join(tables)}")
    else:
        table = replace(known, forks=(*known.forks, *raw["forks"]))
    for other in tables.values():
        twice = set(table.model_types) & set(other.model_types) if other.name != table.name else set()
        if other.part == table.part and twice:
            raise TableError(f"{added.path.name}: {min(twice)} is a model type of {other.name}")
    tables[table.name] = table


def known_architecture(part: str, model_type: Any) -> Architecture | None:
    """The table of a part's `model_type`, None for an unknown family."""
    return next((a for a in architectures().values() if a.part == part and model_type in a.model_types), None)


def architecture_for(part: str, model_type: str) -> Architecture:
    """The table of a part's `model_type`. Raises UnsupportedError (exit 4) for an unknown family."""
    found = known_architecture(part, model_type)
    if found is not None:
        return found
    known = sorted(t for a in architectures().values() if a.part == part for t in a.model_types)
    raise UnsupportedError(
        f"model_type {model_type!r} is not a known {part.replace('_', ' ')} family",
        hint=f"known: {', '.join(known)}; a new family is one table, which --table FILE.toml adds",
    )
