"""Whether two tokenizers make the same ids of every text, as their files say."""

from __future__ import annotations

from typing import Any

from llava_convert.assets.prompts import same_template
from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.model.judgement import Judgement
from llava_convert.model.tables.facts import key_table

# The steps of tokenizer.json from a text to ids. Its decoder only shows ids.
_STEPS = ("normalizer", "pre_tokenizer")
_MODEL = (
    "type",
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
)
# What the keys of tokenizer_config.json mean where they stand in no file.
_DEFAULTS = {"legacy": True}
# Compared by what they mean.
_COMPARED = ("add_bos_token", "added_tokens_decoder", "chat_template")
_SPECIAL = ("bos", "eos", "unk", "pad")
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def compare_tokenizers(
    found: Judgement, mine: Tokenizer, theirs: Tokenizer, *, exact: bool, template: bool = True
) -> None:
    """Add what differs to `found`. Unless `exact`, tokens that only OUT has are left out: they have ids of their own.

    `template` says that readers of OUT take the chat template.
    """
    _compare_tokens(found, mine, theirs, exact=exact)
    for name in _SPECIAL:
        found.compare(f"tokenizer: {name} token", getattr(mine, name), getattr(theirs, name))
    found.compare("tokenizer: adds a BOS", mine.adds_bos, theirs.adds_bos)
    if mine.fast and theirs.fast:
        _compare_steps(found, mine.fast, theirs.fast)
    elif mine.fast:
        found.not_compared.append("the steps of the tokenizer: OUT has no tokenizer.json")
    table, skipped = key_table("tokenizer"), {f"{name}_token" for name in _SPECIAL} | set(_COMPARED)
    sides = []
    for side in (mine, theirs):
        said = {**_DEFAULTS, **side.config}
        sides.append({key: value for key, value in said.items() if table.knows(key) and key not in skipped})
    found.compare_keys("tokenizer_config.json: ", [table], sides[0], sides[1])
    if template and not same_template(mine.chat_template, theirs.chat_template):
        found.differ("chat template", mine.chat_template, theirs.chat_template)
    elif template:
        found.agree("chat template", mine.chat_template, theirs.chat_template)
    else:
        found.not_compared.append("the chat template, which readers of OUT do not take")


def _compare_tokens(found: Judgement, mine: Tokenizer, theirs: Tokenizer, *, exact: bool) -> None:
    ours, others = mine.vocabulary, theirs.vocabulary
    wrong = [token for token, i in ours.items() if others.get(token) != i]
    if exact:
        wrong += [token for token in others if token not in ours]
    elif taken := set(ours.values()):
        wrong += [token for token, i in others.items() if token not in ours and i in taken]
    if wrong:
        first = wrong[0]
        found.differ(
            "tokenizer: tokens",
            {first: ours.get(first), "of": len(ours)},
            {first: others.get(first), "other": len(wrong)},
        )
    else:
        found.agree("tokenizer: number of tokens", len(ours), len(others))
    flags = []
    for side in (mine, theirs):
        flags.append({str(e["content"]): [bool(e.get(flag)) for flag in _FLAGS] for e in side.added.values()})
    for token, wanted in flags[0].items():
        if (token in flags[1] or exact) and wanted != flags[1].get(token):
            found.differ(f"tokenizer: added token {token}", wanted, flags[1].get(token))


def _around(fast: dict[str, Any]) -> list[Any]:
    """What the post-processor puts around a text. A ByteLevel one only moves offsets."""
    step = fast.get("post_processor") or {}
    steps = step.get("processors") or [] if step.get("type") == "Sequence" else [step]
    keys = ("type", "single", "special_tokens", "cls", "sep")
    return [{key: one.get(key) for key in keys} for one in steps if one and one.get("type") != "ByteLevel"]


def _compare_steps(found: Judgement, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for step in _STEPS:
        found.compare(f"tokenizer.json: {step}", mine.get(step), theirs.get(step))
    found.compare("tokenizer.json: post_processor", _around(mine), _around(theirs))
    ours, others = mine.get("model") or {}, theirs.get("model") or {}
    for key in (*_MODEL, "ignore_merges"):
        found.compare(f"tokenizer.json: model.{key}", ours.get(key), others.get(key))
    merges = [
        [one if isinstance(one, str) else " ".join(one) for one in side.get("merges") or ()] for side in (ours, others)
    ]
    if merges[0] != merges[1]:
        at = next((i for i, pair in enumerate(zip(*merges, strict=False)) if pair[0] != pair[1]), min(map(len, merges)))
        found.differ("tokenizer.json: merges", merges[0][at : at + 1], merges[1][at : at + 1])
    else:
        found.agree("tokenizer.json: number of merges", *map(len, merges))
