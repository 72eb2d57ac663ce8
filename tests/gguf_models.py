"""Tiny GGUF files of a LLaVA, written by llama.cpp's own Python library from the committed weights.

The names, the order of the rows of q and k, and the types are spelled out here a second time, in plain NumPy, so that
the package's tables are compared with something else than themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.torch import load_file

Floats = NDArray[np.float32]
HEADS, KV_HEADS = 4, 2
LLM_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
VISION_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
EMBEDDINGS = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
CLIP_KEYS: dict[str, Any] = {
    "clip.has_vision_encoder": True,
    "clip.projector_type": "mlp",
    "clip.vision.image_size": 56,
    "clip.vision.patch_size": 14,
    "clip.vision.embedding_length": 32,
    "clip.vision.feed_forward_length": 64,
    "clip.vision.block_count": 3,
    "clip.vision.projection_dim": 64,
    "clip.vision.attention.head_count": 4,
    "clip.vision.attention.layer_norm_epsilon": 1e-5,
    "clip.vision.image_mean": [0.48145466, 0.4578275, 0.40821073],
    "clip.vision.image_std": [0.26862954, 0.26130258, 0.27577711],
    "clip.vision.feature_layer": [2],
}
Edit = Callable[[dict[str, Any]], Any]


def floats(folder: Path) -> dict[str, Floats]:
    """The tensors of a folder as float32."""
    return {name: t.float().numpy() for name, t in load_file(folder / "model.safetensors").items()}


def interleaved(weight: Floats, heads: int) -> Floats:
    """Row 2i of each head is transformers' row i, row 2i + 1 its row i + half: ggml's rope turns neighbours."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


def llm_tensors(folder: Path) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    for name, weight in floats(folder).items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            inner = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(inner)
            found[f"blk.{layer}.{LLM_NAMES[inner]}.weight"] = interleaved(weight, heads) if heads else weight
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            found[f"{top[name.removesuffix('.weight')]}.weight"] = weight
    return found


def projector() -> dict[str, Floats]:
    """LLaVA's projector from 32 to 64 features, by index and end."""
    made = np.random.default_rng(7)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    return {name: made.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def vision_tensors(folder: Path, *, blocks: int = 3, legacy: bool = False) -> dict[str, Floats]:
    """Tower and projector. `legacy` swaps the names of the two layers of the MLP, as the old script did."""
    found: dict[str, Floats] = {f"mm.{name}": weight for name, weight in projector().items()}
    for name, weight in floats(folder).items():
        name = name.removeprefix("vision_model.")
        if name in EMBEDDINGS:
            found[EMBEDDINGS[name]] = weight
        elif name.startswith("encoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            inner, _, end = rest.rpartition(".")
            disk = VISION_NAMES[inner]
            if legacy:
                disk = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(disk, disk)
            if int(layer) < blocks:
                found[f"v.blk.{layer}.{disk}.{end}"] = weight
    return found


def llm_keys(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    ids = {i: token for token, i in model["vocab"].items()} | {entry["id"]: entry["content"] for entry in added}
    special = {entry["id"] for entry in added}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [ids[i] for i in range(len(ids))],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(ids))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 448,
        "tokenizer.ggml.eos_token_id": 457,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}",
    }


def write(
    path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Floats], types: str, *, split: int = 0
) -> Path:
    """A file in which matrices are of type `types` ("F16", "Q8_0", ...) and all else is F32.

    With `split` no file has more tensors than that.
    """
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, weight in tensors.items():
        kind = GGMLQuantizationType[types] if weight.ndim > 1 else GGMLQuantizationType.F32
        if weight.ndim > 2 and types not in ("F32", "F16", "BF16"):
            kind = GGMLQuantizationType.F16
        _add_tensor(writer, name, weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: GGUFWriter, name: str, weight: Floats, kind: GGMLQuantizationType) -> None:
    if kind == GGMLQuantizationType.BF16:
        raw = torch.from_numpy(weight).bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw.reshape(*weight.shape[:-1], weight.shape[-1] * 2), raw_dtype=kind)
    elif kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor(name, weight.astype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32))
    else:
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)


def write_llm(path: Path, folder: Path, types: str = "BF16", **keys: Any) -> Path:
    """The language model of a folder; `keys` replace those of the metadata, None leaves one out (dots as `__`)."""
    return write(path, "llama", _edited(llm_keys(folder), keys), llm_tensors(folder), types)


def write_mmproj(
    path: Path, folder: Path, types: str = "F32", *, blocks: int = 3, legacy: bool = False, **keys: Any
) -> Path:
    """The tower of a folder, with a projector."""
    tensors = vision_tensors(folder, blocks=blocks, legacy=legacy)
    return write(path, "clip", _edited(CLIP_KEYS | {"clip.vision.block_count": blocks}, keys), tensors, types)


def _edited(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(keys) | {name.replace("__", "."): value for name, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}
