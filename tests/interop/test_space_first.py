"""SentencePiece with `legacy` false: what a GGUF keeps of it for the way back."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

import llava_convert
from tests.interop.test_llama_cpp import hard_strings
from tests.interop.wide_models import make_wide


def test_the_space_stands_at_the_beginning_alone_after_gguf_and_back(tiny: Path, tmp_path: Path) -> None:
    source = make_wide("once", tmp_path / "once", tiny)
    llava_convert.convert(source, to="hf", out=tmp_path / "hf")
    llava_convert.convert(tmp_path / "hf", to="gguf", out=tmp_path / "gguf")
    llava_convert.convert(tmp_path / "gguf", to="hf", out=tmp_path / "back")
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["legacy"] is False
    mine, back = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    texts = [*hard_strings(240), "<s>a", "<s> a", "a</s>b", "  two"]
    assert [text for text in texts if mine(text)["input_ids"] != back(text)["input_ids"]] == []
    assert llava_convert.verify(tmp_path / "gguf", tmp_path / "back")
