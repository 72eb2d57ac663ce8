"""What must hold of a tokenizer's JSON files before their parts are gone by: hand-edited ones break in every way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.model.tables.types import check_types

MOST_ID = 1 << 31


def require_shape(name: str, found: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where a part of the file `name` that a conversion reads is of another type than it must be."""
    check_types(found, name, str(path))
    for key, sound in _PARTS.get(name, {}).items():
        if found.get(key) is not None and not sound(found[key]):
            raise InputError(f"{path}: {key} is not what a tokenizer has there", hint="get the file again")
    if name in ("vocab.json", "added_tokens.json") and not _is_vocabulary(found):
        raise InputError(f"{path}: is not an object of tokens and their ids", hint="get the file again")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_ID


def _is_vocabulary(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    ids = value.values()
    return not value or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < MOST_ID)


def _is_pieces(value: Any) -> bool:
    """Of a Unigram model: [text, score]."""
    return isinstance(value, list) and all(
        isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) for piece in value
    )


def _is_model(value: Any) -> bool:
    if not isinstance(value, dict) or not _are_merges(value.get("merges")):
        return False
    vocab = value.get("vocab", {})
    return _is_vocabulary(vocab) or _is_pieces(vocab)


def _are_merges(value: Any) -> bool:
    """Of a BPE model: "a b" each, or since tokenizers 0.20 ["a", "b"]."""
    if value is None:
        return True
    if not isinstance(value, list) or not set(map(type, value)) <= {str, list}:
        return False
    pairs = [merge for merge in value if type(merge) is list]
    return set(map(len, pairs)) <= {2} and set(map(type, chain.from_iterable(pairs))) <= {str}


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _are_added(value: Any) -> bool:
    return isinstance(value, list) and all(_is_token(e) and _is_id(e.get("id")) for e in value)


def _is_decoder(value: Any) -> bool:
    return isinstance(value, dict) and all(
        i.isascii() and i.isdecimal() and int(i[:20]) < MOST_ID and _is_token(token) for i, token in value.items()
    )


def _is_processor(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner, single = value.get("processors") or [], value.get("single") or []
    return (
        isinstance(inner, list)
        and all(map(_is_processor, inner))
        and isinstance(single, list)
        and all(isinstance(e, dict) and isinstance(e.get("SpecialToken", {}), dict) for e in single)
    )


def _are_templates(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(isinstance(e, dict) and isinstance(e.get("name"), str) and "template" in e for e in value)
    )


_PARTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "tokenizer.json": {"added_tokens": _are_added, "model": _is_model, "post_processor": _is_processor},
    "tokenizer_config.json": {"added_tokens_decoder": _is_decoder, "chat_template": _are_templates},
    "chat_template.json": {"chat_template": _are_templates},
}
