"""Rows of the embedding held against what config and tokenizer know, and what the user wants where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.model.checkpoint import LLM
from llava_convert.model.configs import family
from llava_convert.model.recipe import Model, Recipe
from llava_convert.ops.rows import PadRows, TakeRows

ROWS, TOKENS = "rows", "tokens"  # the words of --vocab
_FILL = "each the mean of the others"


def settle_rows(recipes: dict[str, Recipe], config: dict[str, Any], asked: str | None) -> str:
    """Make rows and `vocab_size` agree where they do not; returns what was done, "" where they agree.

    `rows`: the config says what the weights have; `tokens`: the weights get what the config says. Raises InputError
    (exit 3), naming both ways, where nothing is asked.
    """
    table = family(LLM, config)
    found, known = recipes[table.embedding], config.get("vocab_size")
    rows = found.shape[0]
    if not isinstance(known, int) or rows == known or recipes[table.head].shape[0] != rows:
        return ""
    if asked == ROWS:
        config["vocab_size"] = rows
        beyond = "; those beyond have no name, and tokens that are added take the first of them" if rows > known else ""
        return f"the vocabulary has the {rows} rows of the weights, where the config says {known}{beyond}"
    apart = abs(rows - known)
    if asked == TOKENS:
        _resize(recipes, table.embedding, table.head, known)
        what = f"{apart} rows beyond it are left out" if rows > known else f"{apart} rows are added, {_FILL}"
        return f"the vocabulary has the {known} rows that the config says, and the weights {rows}: {what}"
    more = "were added in training code, which no config or tokenizer tells" if rows > known else "have no row"
    does = "leaves them out" if rows > known else f"adds their rows, {_FILL}"
    raise InputError(
        "the config and the tensors of the language model disagree: "
        f"{table.embedding} has {rows} rows, but the config has vocab_size {known} "
        f"(config {[known, *found.shape[1:]]}, {found.origin} {list(found.shape)}): {apart} tokens {more}",
        hint=f"--vocab {ROWS} follows the weights, --vocab {TOKENS} follows the config ({does}); or give a base "
        "by --llm with the right config and tokenizer",
    )


def with_rows_for(model: Model, tokens: int, asked: str | None) -> Model:
    """The model with a row for each of `tokens`, where the user wants that. The caller refuses what lacks one."""
    rows = model.recipes[model.embedding].shape[0] if model.embedding in model.recipes else tokens
    if asked != TOKENS or rows >= tokens or model.added is not None:  # which takes off tokens with their rows
        return model
    recipes = dict(model.recipes)
    _resize(recipes, model.embedding, model.head, tokens)
    configs: Mapping[str, dict[str, Any]] = {**model.configs, LLM: {**model.configs[LLM], "vocab_size": tokens}}
    note = f"{tokens - rows} tokens of the tokenizer had no row of the embedding: rows are added, {_FILL}"
    return replace(model, recipes=recipes, configs=configs, vocabulary=note, notes=(*model.notes, note))


def _resize(recipes: dict[str, Recipe], embedding: str, head: str, rows: int) -> None:
    for name in (embedding, head):
        recipes[name] = recipes[name].then(PadRows(rows) if rows > recipes[name].shape[0] else TakeRows(rows))
