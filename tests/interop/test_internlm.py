"""InternLM2 and InternLM, of which transformers has no class: from xtuner's checkpoints to each layout.

The reference is their own forward, read in modeling_internlm2.py and modeling_internlm.py and expressed again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

import llava_convert
from llava_convert.core.errors import UnsupportedError
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import TOKENS, ids_of
from tests.interop.llama_cpp import LlamaCpp, differing, llm_file, tensors
from tests.interop.made_tokenizers import learnt_pieces, model_file

TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 448, "eos_token_id": 449,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "internlm2": {
        **SIZES, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "num_key_value_heads": 2,
        "bias": False, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm2-biased": {
        **SIZES, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "num_key_value_heads": 1,
        "bias": True, "rope_theta": 10000, "rope_scaling": None,
    },
    "internlm": {**SIZES, "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True},
}  # fmt: skip
CFG = """\
llm_name_or_path = '{llm}'
visual_encoder_name_or_path = '{eyes}'
prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.internlm2_chat'
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path='{llm}',
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='{eyes}',
        type='transformers.CLIPVisionModel.from_pretrained'))
"""
Tensors = dict[str, torch.Tensor]


def made(config: dict[str, Any]) -> Tensors:
    """Random weights under the names of the family's own code."""
    h, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size, kv = h // heads, config.get("num_key_value_heads", heads)
    two = config["model_type"] == "internlm2"
    words, head = ("model.tok_embeddings", "output") if two else ("model.embed_tokens", "lm_head")
    shapes: dict[str, tuple[int, ...]] = {f"{words}.weight": (config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        if two:
            linear = {"attention.wqkv": ((heads + 2 * kv) * size, h), "attention.wo": (h, h)}
            plain = {"feed_forward.w1": (mlp, h), "feed_forward.w3": (mlp, h), "feed_forward.w2": (h, mlp)}
            norms = ("attention_norm", "ffn_norm")
        else:
            linear = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
            plain = {"mlp.gate_proj": (mlp, h), "mlp.up_proj": (mlp, h), "mlp.down_proj": (h, mlp)}
            norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}.{name}.weight": shape for name, shape in (linear | plain).items()}
        if config["bias"]:
            shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"{at}.{name}.weight": (h,) for name in norms}
    shapes |= {"model.norm.weight": (h,), f"{head}.weight": (config["vocab_size"], h)}
    random = torch.Generator().manual_seed(4)
    found = {name: torch.randn(shape, generator=random) * 0.12 for name, shape in shapes.items()}
    return {name: value + ("norm" in name) for name, value in found.items()}


def forward(state: Tensors, config: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """Logits of a text's embeddings: (length, width) to (length, vocabulary)."""
    heads, length = config["num_attention_heads"], len(hidden)
    size, kv = config["hidden_size"] // heads, config.get("num_key_value_heads", heads)
    two = config["model_type"] == "internlm2"
    angles = torch.outer(
        torch.arange(length).float(), config.get("rope_theta", 10000) ** -(torch.arange(0, size, 2).float() / size)
    )
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return state[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def turned(x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-other, one], dim=-1) * sin

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        x = norm(hidden, f"{at}.attention_norm" if two else f"{at}.input_layernorm")
        if two:  # rearrange(wqkv, "q (h gs d) -> q h gs d", gs = 2 + queries a key): queries, key, value
            groups = linear(x, f"{at}.attention.wqkv").view(length, kv, 2 + heads // kv, size)
            q, k, v = groups[:, :, : heads // kv].reshape(length, heads, size), groups[:, :, -2], groups[:, :, -1]
        else:
            q, k, v = (linear(x, f"{at}.self_attn.{n}_proj").view(length, heads, size) for n in "qkv")
        q, k, v = turned(q), turned(k).repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        seen = nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True)
        rows = seen[0].transpose(0, 1).reshape(length, -1)
        hidden = hidden + linear(rows, f"{at}.attention.wo" if two else f"{at}.self_attn.o_proj")
        x = norm(hidden, f"{at}.ffn_norm" if two else f"{at}.post_attention_layernorm")
        ff = "feed_forward.w{}" if two else "mlp.{}_proj"
        gate, up, down = (f"{at}.{ff.format(n)}" for n in ((1, 3, 2) if two else ("gate", "up", "down")))
        hidden = hidden + linear(nn.functional.silu(linear(x, gate)) * linear(x, up), down)
    return linear(norm(hidden, "model.norm"), "output" if two else "lm_head")


def checkpoint(folder: Path, tiny: Path, name: str) -> Path:
    """`iter_2.pth` of a whole language model and a projector, and their bases beside it."""
    config = CONFIGS[name]
    state = made(config)
    (folder / "llm").mkdir(parents=True)
    for file in (tiny / "llm").iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(file, folder / "llm")
    (folder / "llm" / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "llm" / "model.safetensors", {"format": "pt"})
    random = torch.Generator().manual_seed(8)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    projector = {f"projector.model.{k}": torch.randn(s, generator=random) * 0.2 for k, s in shapes.items()}
    meta = {"cfg": CFG.format(llm=folder / "llm", eyes=tiny / "vit"), "epoch": 0, "iter": 2}
    torch.save(
        {"meta": meta, "state_dict": {f"llm.{k}": v for k, v in state.items()} | projector}, folder / "iter_2.pth"
    )
    return folder / "iter_2.pth"


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_to_hf(tiny: Path, tmp_path: Path, pixels: torch.Tensor, name: str) -> None:
    """No key is missing or left; a picture among words gives the logits of the family's own code."""
    source = checkpoint(tmp_path / "source", tiny, name)
    told = llava_convert.convert(source, to="hf", out=tmp_path / "hf", dtype="float32", verify="full")
    assert any("written as llama" in note for note in told.notes)
    model, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = ids_of(model.config, 48, 16)
    found = model.eval()(input_ids=ids, pixel_values=pixels).logits[0, :, :TOKENS]
    rows = model.get_image_features(pixel_values=pixels)
    rows = getattr(rows, "pooler_output", rows)
    rows = rows[0] if isinstance(rows, list | tuple) or rows.dim() == 3 else rows
    state = made(CONFIGS[name])
    words = state["model.tok_embeddings.weight" if "internlm2" in name else "model.embed_tokens.weight"]
    hidden = torch.cat([words[ids[0, :1]], rows, words[ids[0, 17:]]])
    assert gap(found, forward(state, CONFIGS[name], hidden)) <= TOLERANCE
    assert llava_convert.verify(source, tmp_path / "hf")


@pytest.mark.parametrize("name", CONFIGS)
def test_as_itself_for_xtuner(tiny: Path, tmp_path: Path, name: str) -> None:
    source = checkpoint(tmp_path / "source", tiny, name)
    llava_convert.convert(source, to="xtuner", out=tmp_path / "x", dtype="float32")
    found = load_file(tmp_path / "x" / "model.safetensors")
    state = made(CONFIGS[name])
    assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == CONFIGS[name]["model_type"]


def test_official_has_no_class_for_it(tiny: Path, tmp_path: Path) -> None:
    """The hint leads to an output."""
    source = checkpoint(tmp_path / "source", tiny, "internlm2")
    with pytest.raises(UnsupportedError, match="no class for internlm2") as refused:
        llava_convert.convert(source, to="official", out=tmp_path / "o")
    assert "as_family" in str(refused.value.hint) or "--as llama" in str(refused.value.hint)
    llava_convert.convert(source, to="official", out=tmp_path / "o", as_family="llama")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]


def test_a_lora_on_the_fused_module(tiny: Path, tmp_path: Path) -> None:
    """As xtuner leaves it: on wqkv, wo and w1; merged before the rows are told apart."""
    source = checkpoint(tmp_path / "source", tiny, "internlm2")
    full = torch.load(source, weights_only=False)
    state, random = made(CONFIGS["internlm2"]), torch.Generator().manual_seed(3)
    kept = {k: v for k, v in full["state_dict"].items() if not k.startswith("llm.")}
    wanted = dict(state)
    for i in range(2):
        for module in ("attention.wqkv", "attention.wo", "feed_forward.w1"):
            at = f"model.layers.{i}.{module}"
            out, into = state[f"{at}.weight"].shape
            a, b = torch.randn(8, into, generator=random) * 0.1, torch.randn(out, 8, generator=random) * 0.1
            kept[f"llm.base_model.model.{at}.lora_A.default.weight"] = a
            kept[f"llm.base_model.model.{at}.lora_B.default.weight"] = b
            wanted[f"{at}.weight"] = (state[f"{at}.weight"].double() + 2 * b.double() @ a.double()).float()
    lora = "    llm_lora=dict(type='peft.LoraConfig', r=8, lora_alpha=16, lora_dropout=0.05, bias='none'),\n"
    cfg = full["meta"]["cfg"].replace("freeze_llm=False,\n", "freeze_llm=True,\n" + lora)
    torch.save({"meta": {**full["meta"], "cfg": cfg}, "state_dict": kept}, source)
    llava_convert.convert(source, to="hf", out=tmp_path / "hf", dtype="float32")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    hidden = state["model.tok_embeddings.weight"][torch.arange(300, 320)]
    groups = wanted["model.layers.0.attention.wqkv.weight"].view(2, 4, 16, 64)
    assert torch.equal(found["language_model.model.layers.0.self_attn.q_proj.weight"], groups[:, :2].reshape(64, 64))
    assert torch.equal(found["language_model.model.layers.0.self_attn.k_proj.weight"], groups[:, 2].reshape(32, 64))
    assert gap(forward(wanted, CONFIGS["internlm2"], hidden), forward(state, CONFIGS["internlm2"], hidden)) > 0.05


@pytest.mark.peers
@pytest.mark.parametrize("name", CONFIGS)
def test_in_llama_cpp(tiny: Path, tmp_path: Path, converted: Converter, llama_cpp: LlamaCpp, name: str) -> None:
    source = checkpoint(tmp_path / "source", tiny, name)
    ours = converted.onward(source, "gguf", outtype="f32", part="llm")
    ids = [448, *range(300, 340)]
    found = llama_cpp.ask(text={"kind": "logits", "model": llm_file(ours, "f32"), "ids": ids})["text"]["array"]
    state = made(CONFIGS[name])
    words = state["model.tok_embeddings.weight" if "internlm2" in name else "model.embed_tokens.weight"]
    wanted = forward(state, CONFIGS[name], words[torch.tensor(ids)])
    assert gap(torch.from_numpy(found), wanted) <= TOLERANCE


@pytest.mark.peers
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_tensors_of_their_converter(
    tiny: Path, tmp_path: Path, converted: Converter, llama_cpp: LlamaCpp, outtype: str
) -> None:
    """Theirs has an architecture of its own, in which the parts of wqkv have the names and the bytes of ours."""
    source = checkpoint(tmp_path / "source", tiny, "internlm2")
    ours = converted.onward(source, "gguf", outtype=outtype, part="llm")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "source" / "llm" / file, theirs)
    (theirs / "tokenizer.model").write_bytes(model_file(learnt_pieces()))
    found, wanted = tensors(llm_file(ours, outtype)), tensors(llama_cpp.convert(theirs, outtype))
    assert differing(found, wanted) == {}
    assert len(found) == 3 + 2 * 9
