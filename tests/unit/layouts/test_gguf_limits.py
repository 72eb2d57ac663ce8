"""What llama.cpp's graphs and tokenizers cannot be told, and what a file says in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_convert.assets.tokenizer.files import open_tokenizer
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.gguf import limits, rope, token_flags
from llava_convert.layouts.gguf.names import config_of, metadata_of, table_for_family
from llava_convert.storage.sidecars import folder_sidecars
from tests.unit.layouts.test_gguf_metadata import config, stored

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "computes only silu"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("qwen2", {"head_dim": 32}, "4 heads of size 32 with hidden_size 64"),
        ("olmo2", {"head_dim": 32}, "4 heads of size 32 with hidden_size 64"),
        ("olmo2", {"attention_bias": True}, "reads no bias of attn_output"),
        ("olmo2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "olmo2 does not compute it"),
        ("qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "qwen2 does not compute it"),
        ("llama", {"rope_scaling": {"type": "longrope", **LONGROPE}}, "'longrope'"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast 16 .* always uses 32"),
        ("mistral", {"rope_scaling": {**YARN, "beta_slow": 2}}, "beta_slow 2"),
        ("qwen2", {"rope_scaling": {**YARN, "truncate": False}}, "truncate False .* always uses true"),
    ],
)
def test_what_llama_cpp_computes_otherwise(kind: str, settings: dict[str, Any], said: str) -> None:
    """Its graphs take no key for these; transformers computes each of them."""
    with pytest.raises(UnsupportedError, match=said):
        metadata_of(table_for_family(kind), config(kind, **settings))


def test_scalings_without_their_numbers() -> None:
    lengths = {"original_max_position_embeddings": 512, "max_position_embeddings": 2048}
    told = config("llama", rope_scaling={"type": "yarn", **lengths})
    assert metadata_of(table_for_family("llama"), told)["llama.rope.scaling.factor"].value == 4.0
    with pytest.raises(InputError, match="should be a number above 0, found None"):
        metadata_of(table_for_family("qwen2"), config("qwen2", rope_scaling={"type": "linear"}))
    for factors, found in (([1.0] * 7, "7 of them"), (None, "None"), ([1.0] * 7 + ["x"], "8 of them")):
        scaling = {"type": "longrope", "short_factor": factors, "long_factor": [1.0] * 8}
        with pytest.raises(InputError, match=f"short_factor .* 8 numbers, found {found}"):
            rope.factor_tensors("phi3", config("phi3", rope_scaling=scaling))


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, None),
        ({"attention_factor": 1.3}, 1.3),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"beta_fast": 32, "beta_slow": 1.0, "truncate": True}, None),
    ],
)
def test_the_attention_factor_of_yarn(more: dict[str, float], factor: float | None) -> None:
    """The runtime multiplies its own 1 + 0.1 ln(factor) by attn_factor (llama-context.cpp)."""
    table = table_for_family("llama")
    said = metadata_of(table, config("llama", rope_scaling={**YARN, **more}))
    key = "llama.rope.scaling.attn_factor"
    assert (key in said) == (factor is not None)
    back = config_of(table, said, stored(["token_embd.weight"]))["rope_scaling"]
    if factor is None:
        assert "attention_factor" not in back
    else:
        assert said[key].value * (0.1 * np.log(4) + 1) == pytest.approx(factor)
        assert back["attention_factor"] == pytest.approx(factor, rel=1e-6)


def test_phi_3s_rope() -> None:
    """longrope's attention factor by the two lengths or as stated, and a part of a head that is rotated."""
    table = table_for_family("phi3")
    long = {"original_max_position_embeddings": 512, "max_position_embeddings": 8192}
    before = config("phi3", rope_scaling={"type": "longrope", **LONGROPE}, **long)
    assert metadata_of(table, before)["phi3.rope.scaling.attn_factor"].value == pytest.approx((13 / 9) ** 0.5)
    assert metadata_of(table, before)["phi3.rope.dimension_count"].value == 16
    before = config("phi3", partial_rotary_factor=0.75)
    said = metadata_of(table, before)
    assert said["phi3.rope.dimension_count"].value == 12
    assert config_of(table, said, stored(["token_embd.weight"]))["partial_rotary_factor"] == 0.75
    stated = {"type": "longrope", "attention_factor": 1.5, **LONGROPE}
    said = metadata_of(table, config("phi3", rope_scaling=stated, partial_rotary_factor=0.5, **long))
    assert said["phi3.rope.dimension_count"].value == 8
    assert said["phi3.rope.scaling.attn_factor"].value == 1.5


def test_a_mistral_is_told_by_its_window() -> None:
    table = table_for_family("mistral")
    for window, kind in ((4096, "mistral"), (None, "llama")):
        said = metadata_of(table, config("mistral", sliding_window=window))
        back = config_of(table, said, stored(["token_embd.weight", "output.weight"]))
        assert (back["model_type"], back.get("sliding_window")) == (kind, window)
    assert "llama.attention.key_length" not in said
    assert metadata_of(table, config("mistral", head_dim=32))["llama.attention.key_length"].value == 32


@pytest.mark.parametrize(
    ("kind", "settings", "warned"),
    [
        ("mistral", {"sliding_window": 1024}, True),
        ("mistral", {"sliding_window": 2048}, False),
        ("mistral", {"sliding_window": None}, False),
        ("phi3", {"sliding_window": 2047}, True),
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 1024}, False),
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": True}, True),
        ("llama", {}, False),
    ],
)
def test_windows_are_warned_of(kind: str, settings: dict[str, Any], warned: bool) -> None:
    """Where they are smaller than the longest text, 2048 here."""
    said = limits.warnings(config(kind, **settings))
    assert [str(settings.get("sliding_window")) in line for line in said] == [True] * warned


PHI3_TOKENS = [("<unk>", False), ("<s>", False), ("</s>", True), ("<|endoftext|>", False), ("<|end|>", True)]


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("llava", PHI3_TOKENS, "llava-phi-3"),
        ("LLaVA-Phi-3-mini", PHI3_TOKENS, "LLaVA-Phi-3-mini"),
        ("phi3", PHI3_TOKENS, "phi3"),
        ("llava", [(text, False) for text, _ in PHI3_TOKENS], "llava"),
        # Which would have the runtime look for tokens that are not there, and end.
        ("not-phi-3-but-qwen", [("<|im_end|>", False)], "not-phi 3-but-qwen"),
        ("llava", [("<|im_end|>", True)], "llava"),
    ],
)
def test_the_name_by_which_phi_3_is_known(
    tmp_path: Path, name: str, tokens: list[tuple[str, bool]], expected: str
) -> None:
    entries = [
        {"id": i, "content": text, **dict.fromkeys(("lstrip", "normalized", "single_word"), False), "rstrip": strip}
        for i, (text, strip) in enumerate(tokens)
    ]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {text: i for i, (text, _) in enumerate(tokens)}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": entries, "model": model, "version": "1.0"}))
    tokenizer = open_tokenizer(folder_sidecars(tmp_path))
    assert token_flags.runtime_name(name, tokenizer) == expected
    strips = any(strip for _, strip in tokens)
    assert bool(token_flags.unsaid(tokenizer)) == (strips and tokens != PHI3_TOKENS)
