"""Damage to JSON that keeps its form, mostly: other types, absurd numbers, keys that are gone, twice or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any


class Pairs(list[Any]):
    """An object as its (key, value) pairs, so that a key can be there twice."""


class Raw(str):
    """A piece of text that stands in the file as it is."""


_DEEP = 2000
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2.0, 0.5, -0.5, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63,
    2**64, -(2**63), 10**400, 1e308, -1e308, 1e-320, Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"),
    Raw("-0.0"), Raw("01"),
    "", "x", "2", "0.5", "None", "null", "\ud800", "\x1b[31m\x07", "a\nb\rc", "\0", "../../x",
    "/etc/passwd", "C:\\Users\\x\\m",
    "\\\\srv\\share", "https://a.b/?token=x", "x" * 10_000, "{{ 1/0 }}", "<|image|>", "<image>",
    "<pad>", "</s>", "é漢\u202e",
    [], [None], [[]], [0], [-1], [2**40], ["x"], [1, "2"], [0.5, 0.5, 0.5], [1] * 5000, Pairs(), Pairs([("x", 1)]),
    Pairs([("content", "x")]), Pairs([("", Pairs())]), Raw("[" * 60 + "]" * 60), Raw("[" * _DEEP + "]" * _DEEP),
    Raw('{"a":' * _DEEP + "1" + "}" * _DEEP), "llama", "gelu", "silu", "qwen2", "float16", "bfloat16",
    "clip_vision_model",
    "linear", "mlp2x_gelu", "default", "full", "F32", "F64", "BF16", "I64", "F8_E4M3", "F4", "U8", "BOOL",
)  # fmt: skip
_WHOLE = (
    b"", b" ", b"null", b"[]", b"{}", b"[{}]", b'"x"', b"5", b"{", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\0" * 100,
    b"<!doctype html><title>x</title>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
)  # fmt: skip


def damaged_json(data: bytes, rng: Random, others: Mapping[str, Any]) -> bytes:
    """A JSON file after one to three changes. `others` are the keys of the files beside it, with their values."""
    if rng.random() < 0.04:
        return rng.choice(_WHOLE)
    root = json.loads(data, object_pairs_hook=Pairs)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(root, rng, others)
    made = bytearray(_text(root).encode("utf-8"))
    if rng.random() < 0.04:
        at = rng.randrange(len(made) + 1)
        made[at : at + rng.randrange(3)] = rng.choice((b"\xff", b"\0", b",", b"}", b'"', b"\\u", b"/* x */", b"'"))
    elif rng.random() < 0.02:
        del made[rng.randrange(len(made) + 1) :]
    return bytes(made)


def _change(root: Any, rng: Random, others: Mapping[str, Any]) -> None:
    holder, at = _pick(root, rng)
    if holder is None:
        return
    value = holder[at][1] if isinstance(holder, Pairs) else holder[at]
    match rng.randrange(12):
        case 0:
            del holder[at]
        case 1 if isinstance(holder, Pairs):
            holder.append((holder[at][0], _other(value, rng)))
        case 2 if isinstance(holder, Pairs):
            key = rng.choice((holder[at][0].upper(), holder[at][0] + "x", "", "x" * 5000, "\x1b[31m", "\ud800"))
            holder[at] = (key, value)
        case 3 if isinstance(holder, Pairs) and others:
            key = rng.choice(sorted(others))
            holder.append((key, others[key] if rng.random() < 0.5 else _other(others[key], rng)))
        case 4 if isinstance(holder, Pairs):
            first, second = rng.randrange(len(holder)), rng.randrange(len(holder))
            one, two = holder[first], holder[second]
            holder[first], holder[second] = (one[0], two[1]), (two[0], one[1])
        case 5 | 6:
            _set(holder, at, _other(value, rng))
        case 7 if isinstance(holder, Pairs) and rng.random() < 0.3:
            holder.append(
                (rng.choice(("auto_map", "trust_remote_code", "quantization_config", "mm_x", "image_x")), value)
            )
        case _:
            _set(holder, at, rng.choice(_ODD))


def _pick(root: Any, rng: Random) -> tuple[Any, int]:
    """A place in the tree, by a walk from its root, so that a long list is no likelier than a key beside it."""
    holder, node = None, root
    at = 0
    while isinstance(node, list) and node and (holder is None or rng.random() < 0.75):
        holder, at = node, rng.randrange(len(node))
        node = node[at][1] if isinstance(node, Pairs) else node[at]
    return holder, at


def _set(holder: Any, at: int, value: Any) -> None:
    holder[at] = (holder[at][0], value) if isinstance(holder, Pairs) else value


def _other(value: Any, rng: Random) -> Any:
    """A value that is nearly the one that was there."""
    wrapped: tuple[Callable[[], Any], ...] = (lambda: [value], lambda: Pairs([("x", value)]), lambda: [value, value])
    near: tuple[Callable[[], Any], ...] = ()
    if isinstance(value, bool):
        near = (lambda: not value, lambda: str(value), lambda: int(value))
    elif isinstance(value, int | float):
        near = (
            lambda: value + 1, lambda: value - 1, lambda: -value, lambda: float(value), lambda: str(value),
            lambda: value * 2, lambda: value // 2, lambda: value * 10**6,
        )  # fmt: skip
    elif isinstance(value, Pairs):
        near = (lambda: [list(pair) for pair in value], lambda: Pairs(value[: len(value) // 2]), lambda: None)
    elif isinstance(value, list):
        near = (
            lambda: value[:-1], lambda: value * 2, lambda: value[::-1], lambda: [*value, rng.choice(_ODD)],
            lambda: Pairs((str(n), one) for n, one in enumerate(value)), lambda: value[0] if value else None,
        )  # fmt: skip
    elif isinstance(value, str):
        near = (
            lambda: value[:-1], lambda: value + "x", lambda: value.upper(), lambda: value * 100, lambda: list(value),
            lambda: value + "\ud800",
        )  # fmt: skip
    return rng.choice((*near, *near, *wrapped))()


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_text(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)
