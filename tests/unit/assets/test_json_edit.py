"""A token put into tokenizer.json as text: the bytes around it stay, and the value is what a parser gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_convert.assets.tokenizer.json_edit import edit_added_tokens

NEW = {"id": 9, "content": "<image>", "special": True}
OLD = {"id": 0, "content": '["added_tokens": {}]', "special": True}
REST = {"version": "1.0", "model": {"vocab": {"a": 1, "b": 2}, "merges": ["a b"]}}


def written(raw: bytes, gone: frozenset[tuple[int, str]] = frozenset()) -> tuple[bytes, Any]:
    made = edit_added_tokens(raw, json.loads(raw), [NEW], gone)
    return made, json.loads(made)


@pytest.mark.parametrize("indent", [None, 1, 2, 4])
@pytest.mark.parametrize("old", [[], [OLD], [OLD, {"id": 3, "content": "]", "special": False}]])
@pytest.mark.parametrize("order", [1, -1])
def test_what_stands_around_stays(indent: int | None, old: list[Any], order: int) -> None:
    members = [("version", "1.0"), ("added_tokens", old), ("model", REST["model"])][::order]
    raw = json.dumps(dict(members), indent=indent, ensure_ascii=False).encode()
    made, value = written(raw)
    assert value == {**REST, "added_tokens": [*old, NEW]}
    key = raw.index(b'"added_tokens":')
    assert made.startswith(raw[:key]), "nothing before it was written anew"
    after = raw.rindex(b'"version"' if order == -1 else b'"model"')
    assert made.endswith(raw[after:]), "nothing behind it was written anew"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": {"added_tokens": []}, "version": "1.0"}',
        b'{"model": {"vocab": {"added_tokens": 5}}, "added_tokens": []}',
        b'{"note \\"added_tokens": [], "version": "1.0"}',
        b'{"added_tokens": [], "version": "1.0", "added_tokens": [{"id": 1, "content": "x"}]}',
        b'{"version": "1.0"}',
    ],
    ids=["within another", "a token of that name", "the end of another key", "twice", "not there"],
)
def test_a_text_in_which_the_place_is_not_certain_is_written_anew(raw: bytes) -> None:
    before = json.loads(raw)
    _, value = written(raw)
    assert value == {**before, "added_tokens": [*before.get("added_tokens", []), value["added_tokens"][-1]]}
    assert value["added_tokens"][-1]["content"] == "<image>"
