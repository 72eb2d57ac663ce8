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
    text = raw.decode()
    found = _found(text, parsed)
    if found is None:
        return json.dumps(wanted, indent=2, ensure_ascii=False).encode()
    if re.match(r"\{\s*\n", text):
        body = json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    else:
        body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return (text[: found.start] + body + text[found.stop :]).encode()


def _found(text: str, parsed: dict[str, Any]) -> slice | None:
    """Where the value of the key `added_tokens` is in the text that was parsed; None where that is not certain.

    Certain it is where the key is named once, what stands before it is the beginning of the object, and what follows
    it is the value. So the rest, a vocabulary of megabytes, is not parsed again.
    """
    keys = list(re.finditer(r'"added_tokens"\s*:\s*', text))
    if len(keys) != 1:
        return None
    (key,) = keys
    before = text[: key.start()].rstrip().removesuffix(",")
    with suppress(ValueError):
        first = json.loads(before + "}")
        value, end = json.JSONDecoder().raw_decode(text, key.end())
        if all(parsed.get(name) == first[name] for name in first) and value == parsed.get("added_tokens"):
            return slice(key.end(), end)
    return None


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
