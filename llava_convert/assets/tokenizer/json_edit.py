"""tokenizer.json of the tokenizers library: its components looked through, its added tokens edited in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def edit_added_tokens(
    raw: bytes, parsed: dict[str, Any], new: Sequence[dict[str, Any]], gone: frozenset[tuple[int, str]]
) -> bytes:
    """tokenizer.json with entries put into, or cut out of, `added_tokens`; all other text stays as it was."""
    old = parsed.get("added_tokens") or []
    order = list(old[0]) if old else ["id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"]
    entries = [e for e in old if (e["id"], e["content"]) not in gone] + [
        {k: e[k] for k in order if k in e} for e in new
    ]
    wanted = parsed | {"added_tokens": entries}
    # Where the text is not laid out as expected, something cannot be found (ValueError) or the outcome differs.
    with suppress(ValueError):
        made = _replaced(raw.decode(), len(old), entries)
        if json.loads(made) == wanted:
            return made.encode()
    return json.dumps(wanted, indent=2, ensure_ascii=False).encode()


def _replaced(text: str, count: int, entries: list[dict[str, Any]]) -> str:
    """The text with the first `added_tokens`, of `count` entries, written anew in the indentation of the whole."""
    start = end = text.index("[", text.index('"added_tokens"'))
    for _ in range(count):
        end = json.JSONDecoder().raw_decode(text, text.index("{", end))[1]
    if re.match(r"\{\s*\n", text):
        body = json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    else:
        body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return text[:start] + body + text[text.index("]", end) + 1 :]


def has_type(node: Any, name: str) -> bool:
    """Whether a component of tokenizer.json is, or holds, one of a type."""
    if isinstance(node, dict):
        return node.get("type") == name or any(has_type(value, name) for value in node.values())
    return isinstance(node, list) and any(has_type(value, name) for value in node)


def starts_with(processor: Any, token: str) -> bool:
    """Whether a post-processor begins every text with `token`."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(starts_with(one, token) for one in processor.get("processors") or ())
    first = (processor.get("single") or [{}])[0]
    return bool(first.get("SpecialToken", {}).get("id") == token)
