"""A tokenizer made again of metadata as llama.cpp's converter writes it for the families that are no Llama-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import InputError
from llava_convert.layouts.gguf.rebuilt import tokenizer_files
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sentencepiece import read_model

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPM = ["<unk>", "<s>", "</s>", *BYTES, "▁a", "a", "<|endoftext|>", "<|end|>", "<image>"]
TYPES = [3, 3, 4, *[6] * 256, 1, 1, 3, 3, 3]


def files(tokens: list[str], types: list[int], **more: Any) -> dict[str, bytes]:
    scores = [-1000.0 if kind == 3 else -float(i) for i, kind in enumerate(types)]
    said = {
        "tokenizer.ggml.tokens": Typed("[str]", tuple(tokens)),
        "tokenizer.ggml.token_type": Typed("[i32]", tuple(types)),
        "tokenizer.ggml.scores": Typed("[f32]", tuple(scores)),
        "tokenizer.ggml.model": Typed("str", "llama"),
        "tokenizer.ggml.bos_token_id": Typed("u32", 1),
        "tokenizer.ggml.eos_token_id": Typed("u32", 2),
    }
    return tokenizer_files(said | {key.replace("__", "."): value for key, value in more.items()})


def test_the_unknown_piece_is_one_though_called_a_control_token(tmp_path: Path) -> None:
    """SentencePiece refuses a model without an unknown piece; no key names it where tokenizer.json is not there."""
    made = files(SPM, TYPES)
    pieces, _ = read_model(made["tokenizer.model"], tmp_path)
    assert [piece.type for piece in pieces[:4]] == [2, 3, 4, 6] and len(pieces) == SPM.index("<|endoftext|>")
    assert json.loads(made["tokenizer_config.json"])["unk_token"] == "<unk>"
    assert json.loads(made["tokenizer.json"])["model"]["unk_token"] == "<unk>"


def test_phi_3s_tokens_take_white_space_along() -> None:
    """Of a model of that name, as the runtime has it; not LLaVA's own, behind which a line ends."""
    for name, expected in (("LLaVA-Phi-3-mini", {"</s>", "<|end|>"}), ("llava", set())):
        content = json.loads(files(SPM, TYPES, general__name=Typed("str", name))["tokenizer.json"])
        assert {entry["content"] for entry in content["added_tokens"] if entry["rstrip"]} == expected
        assert [e["content"] for e in content["added_tokens"] if not e["special"]] == ["</s>"]


def test_a_bos_that_is_none() -> None:
    """Qwen2's config names the token that ends a text; its tokenizer has no BOS, nor an unknown token."""
    tokens = ["a", "b", "ab", "<|endoftext|>", "<|im_end|>", "<image>"]
    byte_level = {
        "tokenizer__ggml__model": Typed("str", "gpt2"),
        "tokenizer__ggml__pre": Typed("str", "qwen2"),
        "tokenizer__ggml__merges": Typed("[str]", ("a b",)),
        "tokenizer__ggml__bos_token_id": Typed("u32", 3),
        "tokenizer__ggml__eos_token_id": Typed("u32", 4),
    }
    for adds, expected in ((False, None), (True, "<|endoftext|>")):
        made = files(tokens, [1, 1, 1, 3, 3, 3], **byte_level, tokenizer__ggml__add_bos_token=Typed("bool", adds))
        config = json.loads(made["tokenizer_config.json"])
        assert (config.get("bos_token"), config["eos_token"]) == (expected, "<|im_end|>")
        assert config["unk_token"] is None
        assert json.loads(made["generation_config.json"]) == {"bos_token_id": 3, "eos_token_id": [3, 4]}


@pytest.mark.parametrize("merge", ["a c", "c b", "b a", "ab", "a b a"])
def test_a_merge_of_what_is_no_token(merge: str) -> None:
    """The tokenizers library refuses the tokenizer.json of it ("Token `c` out of vocabulary")."""
    byte_level = {
        "tokenizer__ggml__model": Typed("str", "gpt2"),
        "tokenizer__ggml__pre": Typed("str", "qwen2"),
        "tokenizer__ggml__eos_token_id": Typed("u32", 0),
    }
    tokens = ["a", "b", "ab"]
    files(tokens, [1, 1, 1], **byte_level, tokenizer__ggml__merges=Typed("[str]", ("a b",)))
    with pytest.raises(InputError, match="is not in the vocabulary"):
        files(tokens, [1, 1, 1], **byte_level, tokenizer__ggml__merges=Typed("[str]", ("a b", merge)))
