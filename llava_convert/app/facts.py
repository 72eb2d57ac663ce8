"""Nothing is lost in silence: what a target cannot state, and what no table knows, is refused first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.text import listed
from llava_convert.layouts.info import TARGETS
from llava_convert.model.checkpoint import IMAGE_NEWLINE, LLM, PART_NAMES, PROJECTOR, VISION, Dropped
from llava_convert.model.configs import family
from llava_convert.model.facts import NEWLINE, dialect_for, lost, refuse_unknown_keys, refuse_unsayable, spelled
from llava_convert.model.options import ALL
from llava_convert.model.recipe import Model
from llava_convert.model.tables.facts import facts, unknown_keys
from llava_convert.model.tables.types import read_config

# The beginnings of the facts that a part's output depends on.
_ABOUT = {
    ALL: ("",),
    LLM: ("prompt.max", "prompt.padding"),
    VISION: ("vision.", "picture."),
    PROJECTOR: ("projector.",),
}
# Small files, and the table of their keys.
_FILES = {"generation_config.json": "generation", "preprocessor_config.json": "processor"}


def fitted(model: Model, to: str) -> Model:
    """The model less the tensor that the target has no place for, where the source makes no use of it.

    Where it does, `refuse_lost` refuses the conversion.
    """
    if IMAGE_NEWLINE not in model.recipes or facts()[NEWLINE].layouts[dialect_for(to, model.facts)].can_state(True):
        return model
    recipes = {name: recipe for name, recipe in model.recipes.items() if name != IMAGE_NEWLINE}
    gone = Dropped(IMAGE_NEWLINE, "the source does not cut pictures into tiles, so that nothing reads it")
    return replace(model, recipes=recipes, dropped=(*model.dropped, gone))


def refuse_lost(model: Model, to: str, part: str, allowed: Iterable[str] = ()) -> None:
    """Raise UnsupportedError (exit 4) for a fact that the target cannot state, and for keys that no table knows."""
    checkpoint = model.checkpoint
    about = _ABOUT[part] if part != VISION or PROJECTOR not in _parts(model) else (*_ABOUT[VISION], *_ABOUT[PROJECTOR])
    whole = [name for name, target in TARGETS.items() if not target.adapters_alone]
    refuse_unsayable(checkpoint.layout, to, model.facts, whole, about=about)
    if part == ALL:
        _refuse_keys(checkpoint.unknown_keys, (), str(checkpoint.path), allowed)
    for name, config in model.configs.items():
        if part in (ALL, name):
            table = family(name, config)
            known = {
                *table.defaults,
                *(word for formulas in table.symbols.values() for f in formulas for word in f.split()),
            }
            where = f"the config of the {PART_NAMES[name]}"
            refuse_unknown_keys(config, (name, "common"), where, known=known, allowed=allowed)


def lost_warnings(model: Model, to: str) -> tuple[str, ...]:
    """What readers of the target compute otherwise in a use that the conversion is not refused for."""
    return tuple(lost(dialect_for(to, model.facts), model.facts))


def _refuse_keys(found: Mapping[str, Any], tables: Iterable[str], where: str, allowed: Iterable[str]) -> None:
    refuse_unknown_keys(found, tables, where, allowed=allowed)


def _parts(model: Model) -> set[str]:
    return {name.partition(".")[0] for name in model.recipes}


def unknown_notes(model: Model) -> tuple[str, ...]:
    """One line on the keys of small files that no table knows; they are carried where the target has the file."""
    found: list[str] = []
    for part in (LLM, VISION):
        files = model.files(part) if part in model.configs else None
        for name, table in _FILES.items():
            if files is None or not files.has(name):
                continue
            content = read_config(files, name)
            found += [f"{name}: {key} = {spelled(content[key])}" for key in unknown_keys(content, (table, "common"))]
    return (f"no table knows what these decide: {listed(dict.fromkeys(found))}",) if found else ()
