"""LLaVAs whose language model is the committed Llama in other shapes, fused here in plain NumPy.

So that what the package's tables say is compared with something else than themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, SIZE, LAYERS = 4, 2, 16, 2
Tensors = dict[str, torch.Tensor]
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

MADE_UP = """
# A family that exists nowhere: what InternLM2 and Phi-3 do, under names of its own.
architecture = "made_up"
part = "language_model"
model_types = ["made_up"]
class = "MadeUpForCausalLM"
embedding = "core.words.weight"
head = "answer.weight"
official = "llava_made_up"

tensor = [
  { name = "core.words.weight", shape = ["vocab_size", "hidden_size"] },
  { name = "core.blocks.{layer}.attention.wqkv.weight", shape = ["qkv_heads * head_dim", "hidden_size"] },
  { name = "core.blocks.{layer}.attention.wo.weight", shape = ["hidden_size", "heads * head_dim"] },
  { name = "core.blocks.{layer}.mlp.w13.weight", shape = ["2 * intermediate_size", "hidden_size"] },
  { name = "core.blocks.{layer}.mlp.w2.weight", shape = ["hidden_size", "intermediate_size"] },
  { name = "core.blocks.{layer}.attention_norm.weight", shape = ["hidden_size"] },
  { name = "core.blocks.{layer}.mlp_norm.weight", shape = ["hidden_size"] },
  { name = "core.last_norm.weight", shape = ["hidden_size"] },
  { name = "answer.weight", shape = ["vocab_size", "hidden_size"] },
]

[repeat.layer]
count = "num_hidden_layers"

[symbols]
heads = ["num_attention_heads"]
kv_heads = ["num_key_value_heads", "num_attention_heads"]
qkv_heads = ["num_attention_heads + num_key_value_heads + num_key_value_heads", "3 * num_attention_heads"]
head_dim = ["head_dim", "hidden_size / num_attention_heads"]

[defaults]
hidden_act = "silu"
tie_word_embeddings = false

[gguf]
architecture = "made_up"
row = [
  { disk = "token_embd.{param}", canonical = "language_model.core.words.{param}" },
  { disk = "blk.{layer}.attn_norm.{param}", canonical = "language_model.core.blocks.{layer}.attention_norm.{param}" },
  { canonical = "language_model.core.blocks.{layer}.attention.wqkv.{param}", join = "kv_heads", parts = [
    { disk = "blk.{layer}.attn_q.{param}", share = "heads", op = "rope", heads = "heads" },
    { disk = "blk.{layer}.attn_k.{param}", share = "kv_heads", op = "rope", heads = "kv_heads" },
    { disk = "blk.{layer}.attn_v.{param}", share = "kv_heads" },
  ] },
  { disk = "blk.{layer}.attn_output.{param}", canonical = "language_model.core.blocks.{layer}.attention.wo.{param}" },
  { disk = "blk.{layer}.ffn_norm.{param}", canonical = "language_model.core.blocks.{layer}.mlp_norm.{param}" },
  { canonical = "language_model.core.blocks.{layer}.mlp.w13.{param}", join = "rows", parts = [
    { disk = "blk.{layer}.ffn_gate.{param}" },
    { disk = "blk.{layer}.ffn_up.{param}" },
  ] },
  { disk = "blk.{layer}.ffn_down.{param}", canonical = "language_model.core.blocks.{layer}.mlp.w2.{param}" },
  { disk = "output_norm.{param}", canonical = "language_model.core.last_norm.{param}" },
  { disk = "output.{param}", canonical = "language_model.answer.{param}" },
]
key = [
  { key = "made_up.block_count", config = "num_hidden_layers", type = "u32" },
  { key = "made_up.context_length", config = "max_position_embeddings", type = "u32" },
  { key = "made_up.embedding_length", config = "hidden_size", type = "u32" },
  { key = "made_up.feed_forward_length", config = "intermediate_size", type = "u32" },
  { key = "made_up.attention.head_count", config = "num_attention_heads", type = "u32" },
  { key = "made_up.attention.head_count_kv", config = "num_key_value_heads", type = "u32" },
  { key = "made_up.rope.freq_base", config = "rope_theta", type = "f32" },
  { key = "made_up.attention.layer_norm_rms_epsilon", config = "rms_norm_eps", type = "f32" },
]

[as.llama]
row = [
  { made_up = "core.words.{param}", llama = "model.embed_tokens.{param}" },
  { made_up = "core.blocks.{layer}.attention.wqkv.{param}", join = "kv_heads", parts = [
    { llama = "model.layers.{layer}.self_attn.q_proj.{param}", share = "heads" },
    { llama = "model.layers.{layer}.self_attn.k_proj.{param}", share = "kv_heads" },
    { llama = "model.layers.{layer}.self_attn.v_proj.{param}", share = "kv_heads" },
  ] },
  { made_up = "core.blocks.{layer}.attention.wo.{param}", llama = "model.layers.{layer}.self_attn.o_proj.{param}" },
  { made_up = "core.blocks.{layer}.mlp.w13.{param}", join = "rows", parts = [
    { llama = "model.layers.{layer}.mlp.gate_proj.{param}" },
    { llama = "model.layers.{layer}.mlp.up_proj.{param}" },
  ] },
  { made_up = "core.blocks.{layer}.mlp.w2.{param}", llama = "model.layers.{layer}.mlp.down_proj.{param}" },
  { made_up = "core.blocks.{layer}.attention_norm.{param}", llama = "model.layers.{layer}.input_layernorm.{param}" },
  { made_up = "core.blocks.{layer}.mlp_norm.{param}", llama = "model.layers.{layer}.post_attention_layernorm.{param}" },
  { made_up = "core.last_norm.{param}", llama = "model.norm.{param}" },
  { made_up = "answer.{param}", llama = "lm_head.{param}" },
]
"""


def llama(tiny: Path) -> Tensors:
    """The committed language model, bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in load_file(tiny / "llm" / "model.safetensors").items()}


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """InternLM2's order: for each head of keys its heads of queries, then its keys, then its values."""
    per = HEADS // KV_HEADS * SIZE
    rows = [
        part
        for g in range(KV_HEADS)
        for part in (q[g * per : (g + 1) * per], k[g * SIZE : (g + 1) * SIZE], v[g * SIZE : (g + 1) * SIZE])
    ]
    return torch.cat(rows)


def phi3(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Llama's tensors as Phi-3 has them."""
    found = {name: t for name, t in tensors.items() if not name.endswith(_FUSED)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        q, k, v = (tensors[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv")
        found[f"{at}.self_attn.qkv_proj.weight"] = torch.cat([q, k, v])
        gate, up = (tensors[f"{at}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        found[f"{at}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    return found


def made_up(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Llama's tensors as the made-up family has them."""
    top = {"core.words": "model.embed_tokens", "core.last_norm": "model.norm"}
    found = {f"{name}.weight": tensors[f"{other}.weight"] for name, other in top.items()}
    if "lm_head.weight" in tensors:
        found["answer.weight"] = tensors["lm_head.weight"]
    for i in range(LAYERS):
        at, to = f"model.layers.{i}", f"core.blocks.{i}"
        q, k, v = (tensors[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv")
        gate, up = (tensors[f"{at}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        found |= {
            f"{to}.attention.wqkv.weight": grouped(q, k, v),
            f"{to}.attention.wo.weight": tensors[f"{at}.self_attn.o_proj.weight"],
            f"{to}.mlp.w13.weight": torch.cat([gate, up]),
            f"{to}.mlp.w2.weight": tensors[f"{at}.mlp.down_proj.weight"],
            f"{to}.attention_norm.weight": tensors[f"{at}.input_layernorm.weight"],
            f"{to}.mlp_norm.weight": tensors[f"{at}.post_attention_layernorm.weight"],
        }
    return found


_FUSED = tuple(f"{x}_proj.weight" for x in ("q", "k", "v", "gate", "up"))
SHAPES = {"llama": dict, "phi3": phi3, "made_up": made_up}
CLASSES = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM", "made_up": "MadeUpForCausalLM"}


def text_config(family: str, tiny: Path, **more: Any) -> dict[str, Any]:
    config = json.loads((tiny / "llm" / "config.json").read_text(encoding="utf-8"))
    for key in ("transformers_version", "pretraining_tp", "mlp_bias"):
        del config[key]
    config |= {"architectures": [CLASSES[family]], "model_type": family, "num_key_value_heads": KV_HEADS}
    if family == "phi3":
        config |= {"pad_token_id": None, "sliding_window": None, "original_max_position_embeddings": 8192}
    return config | more


def write_llm(folder: Path, family: str, tiny: Path, tensors: Tensors | None = None, **more: Any) -> Path:
    """The language model alone, as transformers keeps it."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(tiny / "llm" / name, folder / name)
    found = SHAPES[family](llama(tiny) if tensors is None else tensors)
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(text_config(family, tiny, **more)), encoding="utf-8")
    return folder


def write_official(folder: Path, family: str, tiny: Path, tensors: Tensors | None = None, **more: Any) -> Path:
    """A whole LLaVA in the official layout, tower and projector too, all bfloat16."""
    write_llm(folder, family, tiny, tensors, **more)
    found = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tiny / "vit" / "model.safetensors").items():
        found[f"model.vision_tower.vision_tower.{name}"] = tensor.bfloat16()
    generator = torch.Generator().manual_seed(5)
    for name, shape in {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}.items():
        found[f"model.mm_projector.{name}"] = torch.randn(shape, generator=generator).bfloat16()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(tiny / "vit" / "preprocessor_config.json", folder / "preprocessor_config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": f"llava_{family}",
        "mm_vision_tower": str(tiny / "vit"),
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "unfreeze_mm_vision_tower": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a folder of safetensors, those of subfolders by their path."""
    found: Tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = "" if file.parent == folder else f"{file.parent.relative_to(folder).as_posix()}/"
        with safe_open(file, "pt") as opened:
            found |= {prefix + name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    return found


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether they have the same names, dtypes, shapes and bits."""
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        theirs = other[name]
        assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape), name
        bits = torch.int32 if tensor.element_size() == 4 else torch.int16
        assert torch.equal(tensor.view(bits), theirs.view(bits)), name
    return True
