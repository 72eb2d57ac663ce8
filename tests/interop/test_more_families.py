"""Gemma-2, Gemma-3 (text), Qwen3, Granite, StableLM: through the layouts that have them, and in the real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llava_convert
from llava_convert.core.errors import UnsupportedError
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import Made, logits, write
from tests.interop.llama_cpp import PRE, LlamaCpp, differing, llm_file, metadata, tensors
from tests.interop.test_gguf_against_llama_cpp import NAMES, UNKNOWN_ID, unequal
from tests.interop.test_gguf_families import ids_for
from tests.interop.wide_models import WIDES

TOLERANCE = 1e-5
# Theirs says so of every Gemma; the tokenizer here is Llama-2's, which puts a space in front.
OF_GEMMAS_TOKENIZER = "tokenizer.ggml.add_space_prefix"
# Keys that only ours have: an id that theirs looks up in tokenizer.json, and a rope base that the runtime takes anyway.
MORE_KEYS: dict[str, set[str]] = {
    "gemma2": {UNKNOWN_ID, "gemma2.rope.freq_base"},
    "gemma3": {UNKNOWN_ID},
    "granite": {UNKNOWN_ID},
    "stablelm": {"stablelm.rope.freq_base"},
}
TIED = {"tie_word_embeddings": True}
THROUGH = [
    ("gemma2", "xtuner"),
    ("gemma3_text", "xtuner"),
    ("gemma3_text", "gguf"),
    ("qwen3", "xtuner"),
    ("qwen3", "gguf"),
    ("gemma2", "hf"),
    ("granite", "xtuner"),
    ("granite", "gguf"),
    ("olmo2", "xtuner"),
    ("olmo2", "gguf"),
    ("stablelm", "xtuner"),
    ("stablelm", "gguf"),
]


@pytest.mark.parametrize(("family", "to"), THROUGH)
def test_logits_through_a_layout(
    converted: Converter, pixels: torch.Tensor, tmp_path: Path, family: str, to: str
) -> None:
    """With a picture, in texts longer than the window; no key missing or left (`logits` asserts it)."""
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(family=family))
    more = {"outtype": "f32", "mmproj_outtype": "f32"} if to == "gguf" else {"dtype": "float32"}
    out = converted.onward(source, to, **more) if to != "hf" else converted.onward(source, to, max_shard_size="100KB")
    back = out if to == "hf" else converted.onward(out, "hf", dtype="float32")
    assert gap(logits(back, pixels, 120), logits(source, pixels, 120)) <= TOLERANCE
    assert llava_convert.verify(source, out) or to == "xtuner"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3"])
def test_official_has_no_class_for_it(converted: Converter, tmp_path: Path, family: str) -> None:
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(family=family))
    with pytest.raises(UnsupportedError, match=f"no class for {family}"):
        llava_convert.convert(source, to="official", out=tmp_path / "o")


def test_pictures_before_gemma_2_in_llama_cpp(converted: Converter, tmp_path: Path) -> None:
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(TIED, text=TIED, family="gemma2"))
    with pytest.raises(UnsupportedError, match="scales the features of a picture") as refused:
        llava_convert.convert(source, to="gguf", out=tmp_path / "g")
    assert "--part llm" in str(refused.value.hint) or "part" in str(refused.value.hint)
    llava_convert.convert(source, to="gguf", out=tmp_path / "g", part="llm", outtype="f32")
    llava_convert.convert(tmp_path / "g", to="hf", out=tmp_path / "back", dtype="float32")
    first, last = (load_file(at / "model.safetensors") for at in (source, tmp_path / "back"))
    for key, value in last.items():
        before = first.get(f"language_model.{key}", first["language_model.model.embed_tokens.weight"])[: len(value)]
        assert (before - value).abs().max() <= (2**-22 if "norm" in key else 0), key  # once up by one, once down
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (said["model_type"], said["query_pre_attn_scalar"], said["attn_logit_softcapping"]) == ("gemma2", 32, 5.0)


def test_a_local_rope_base(converted: Converter, tmp_path: Path) -> None:
    """Gemma-3's of the layers that look through the window; the base is kept, there and back."""
    source = write(
        tmp_path / "source", converted("tiny", "hf"), Made(text={"rope_local_base_freq": 5000.0}, family="gemma3_text")
    )
    llava_convert.convert(source, to="gguf", out=tmp_path / "g", outtype="f32", mmproj_outtype="f32")
    assert metadata(llm_file(tmp_path / "g", "f32"))["gemma3.rope.freq_base_swa"] == (("FLOAT32",), 5000.0)
    assert llava_convert.verify(source, tmp_path / "g")
    llava_convert.convert(tmp_path / "g", to="hf", out=tmp_path / "hf", dtype="float32")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert said["rope_local_base_freq"] == 5000.0


@pytest.mark.peers
def test_a_local_rope_base_in_llama_cpp(converted: Converter, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", converted("tiny", "hf"), Made(text={"rope_local_base_freq": 50.0}, family="gemma3_text")
    )
    ids = [448, *range(260, 379)]
    ours = converted.onward(source, "gguf", outtype="f32", part="llm")
    task = {"kind": "logits", "model": llm_file(ours, "f32"), "ids": ids}
    found = torch.from_numpy(llama_cpp.ask(text=task)["text"]["array"])
    wanted = wanted_logits(converted, source, ids, gelu=True)
    usual = write(tmp_path / "usual", converted("tiny", "hf"), Made(family="gemma3_text"))
    assert gap(found, wanted) <= 3e-3 < 0.05 < gap(wanted_logits(converted, usual, ids, gelu=True), wanted)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"hidden_activation": "silu"}, "'silu'"),
    ],
)
def test_what_the_runtime_computes_otherwise(
    converted: Converter, tmp_path: Path, text: dict[str, object], named: str
) -> None:
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(text=text, family="gemma3_text"))
    with pytest.raises(UnsupportedError, match=named):
        llava_convert.convert(source, to="gguf", out=tmp_path / "g")


class GeluOfGgml(torch.nn.Module):
    """By a table of float16s (ggml_vec_gelu_f32), but for numbers that are far from 0; norms blow its rounding up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


@torch.inference_mode()
def wanted_logits(converted: Converter, folder: Path, ids: list[int], *, gelu: bool = False) -> torch.Tensor:
    """Of the language model's own class: transformers' LLaVAs leave out what it does to logits (caps, a scale)."""
    alone = converted.onward(folder, "hf", part="llm")
    # The other implementation of attention leaves Gemma-2's soft caps out.
    model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules() if gelu else ():
        if hasattr(module, "act_fn"):
            module.act_fn = GeluOfGgml()
    found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


@pytest.mark.peers
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "olmo2", "stablelm"])
def test_in_llama_cpp(converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    """The tensors of its own converter, and the logits of transformers; longer than a window."""
    folder = converted(name, "hf", dtype="bfloat16" if "gemma" in name else "float16")
    ours = converted.onward(folder, "gguf", outtype="f32,q8_0", part="llm")
    for outtype in ("f32", "q8_0"):
        theirs = llama_cpp.convert(folder, outtype, pre=PRE.get(WIDES[name].tokenizer))
        assert differing(tensors(llm_file(ours, outtype)), tensors(theirs)) == {}, outtype
        one, other = metadata(llm_file(ours, outtype)), metadata(theirs)
        more = MORE_KEYS.get(name, set())
        assert more == {*one} - {*other} - {*NAMES}, outtype
        other.pop(OF_GEMMAS_TOKENIZER, None)
        assert list(unequal({key: one[key] for key in one if key not in more}, other)) == [], outtype
    ids = ids_for(name, 120)
    task = {"kind": "logits", "model": llm_file(ours, "f32"), "ids": ids}
    found = torch.from_numpy(llama_cpp.ask(text=task)["text"]["array"])
    wanted = wanted_logits(converted, folder, ids, gelu="gemma" in name)
    # Gemma's measured at 1e-3: where a number lies between two of the table, the last bit decides which it is.
    assert gap(found, wanted) <= (3e-3 if "gemma" in name else 2 * TOLERANCE)
