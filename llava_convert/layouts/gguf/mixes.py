"""Which type each tensor gets in a file of a given type: llama.cpp's own mixes, so that equal names mean equal files.

From `llama_tensor_get_type_impl` and `tensor_type_fallback` of llama-quant.cpp (ggml-org/llama.cpp 0c1e570), for models
without experts and without an importance matrix; the numbers are `llama_ftype` of llama.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import not_a_choice
from llava_convert.core.tensors import QUANTS
from llava_convert.core.values import dataclass


@dataclass(frozen=True, slots=True)
class Outtype:
    """A file type: its number in `general.file_type`, and the type that most tensors have."""

    file_type: int
    base: str


OUTTYPES: Mapping[str, Outtype] = {
    "f32": Outtype(0, "F32"), "f16": Outtype(1, "F16"), "bf16": Outtype(32, "BF16"), "q8_0": Outtype(7, "Q8_0"),
    "q4_0": Outtype(2, "Q4_0"), "q4_1": Outtype(3, "Q4_1"), "q5_0": Outtype(8, "Q5_0"), "q5_1": Outtype(9, "Q5_1"),
    "q2_k": Outtype(10, "Q2_K"), "q2_k_s": Outtype(21, "Q2_K"), "q3_k_s": Outtype(11, "Q3_K"),
    "q3_k_m": Outtype(12, "Q3_K"), "q3_k_l": Outtype(13, "Q3_K"), "q4_k_s": Outtype(14, "Q4_K"),
    "q4_k_m": Outtype(15, "Q4_K"), "q5_k_s": Outtype(16, "Q5_K"), "q5_k_m": Outtype(17, "Q5_K"),
    "q6_k": Outtype(18, "Q6_K"), "iq4_nl": Outtype(25, "IQ4_NL"), "iq4_xs": Outtype(30, "IQ4_XS"),
}  # fmt: skip
ALIASES = {"int4": "q4_k_m", "int8": "q8_0", "q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# Blocks of 256 weights → the type for rows that are no multiple of 256.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_IQ4 = ("iq4_nl", "iq4_xs")
# `category_is_attn_v`: what q, k and v are fused in is mixed as v is; a rule for qkv further down is never reached.
_VALUES = ("attn_v", "attn_qkv")
_SEVENTY_B = 80  # layers; llama.cpp takes a llama with so many for a 70B, whose v is shared by eight heads


def outtype(name: str, *, option: str = "--outtype") -> str:
    """The name of a file type as it is written. Raises UsageError (exit 2) for one that is unknown."""
    found = ALIASES.get(name.lower(), name.lower())
    if found not in OUTTYPES:
        raise not_a_choice(option, name, [*OUTTYPES, *ALIASES])
    return found


def file_types() -> dict[str, tuple[str, list[str]]]:
    """Every type of file: by name the type of most weights, and other names of the same."""
    return {name: (kind.base, [o for o, of in ALIASES.items() if of == name]) for name, kind in OUTTYPES.items()}


def tensor_type(
    name: str,
    tensor: str,
    shape: tuple[int, ...],
    *,
    layer: int = 0,
    layers: int = 1,
    config: Mapping[str, Any] | None = None,
    tied: bool = False,
) -> str:
    """The type of one tensor of a language model in a file of type `name`.

    `tensor` is its GGUF name, `shape` row-major, `layer` its block of `layers`. `tied`: the head shares the embedding.
    """
    config = config or {}
    base = OUTTYPES[name].base
    if len(shape) < 2 or tensor.endswith("_norm.weight") or not tensor.endswith(".weight"):
        return "F32"
    if base not in QUANTS:
        return base
    kind = tensor.removesuffix(".weight").rpartition(".")[2]
    return fitting(_mixed(name, base, kind, shape, layer, layers, config, tied), shape)


def _mixed(
    name: str,
    base: str,
    kind: str,
    shape: tuple[int, ...],
    layer: int,
    layers: int,
    config: Mapping[str, Any],
    tied: bool,
) -> str:
    heads = int(config.get("num_attention_heads", 1))
    shared = heads // int(config.get("num_key_value_heads") or heads)  # n_gqa
    if kind == "output" or (kind == "token_embd" and tied):
        if shape[-1] % QUANTS[base][0] or base == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    if kind in _VALUES:
        found = _attn_v(name, base, layer, layers, shared)
        return "Q5_K" if layers == _SEVENTY_B and heads != _kv(config) and found in ("Q3_K", "Q4_K") else found
    if kind == "ffn_down":
        return _ffn_down(name, base, layer, layers)
    if kind == "attn_output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(name, base)
    return base


def _kv(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads", 1))


def _attn_v(name: str, base: str, layer: int, layers: int, shared: int) -> str:
    if name == "q2_k":
        return "Q4_K" if shared >= 4 else "Q3_K"
    if name == "q2_k_s" and shared >= 4:
        return "Q4_K"
    if name == "q3_k_m":
        return "Q5_K" if layer < 2 else "Q4_K"
    if name == "q3_k_l":
        return "Q5_K"
    if name in _IQ4:
        return "Q5_K" if shared >= 4 else base
    if name in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
        return "Q6_K"
    return "Q5_K" if name == "q4_k_s" and layer < 4 else base


def _ffn_down(name: str, base: str, layer: int, layers: int) -> str:
    if name == "q2_k":
        return "Q3_K"
    if name == "q2_k_s" and layer < layers // 8:
        return "Q4_K"
    if name == "q3_k_m":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if name == "q3_k_l":
        return "Q5_K"
    if name in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
        return "Q6_K"
    return "Q5_K" if name in ("q4_k_s", *_IQ4) and layer < layers // 8 else base


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the blocks, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def fitting(dtype: str, shape: tuple[int, ...]) -> str:
    """The type itself where its blocks fill the rows, else the nearest that does, at last F16."""
    if dtype in QUANTS and shape[-1] % QUANTS[dtype][0]:
        dtype = _FALLBACK.get(dtype, dtype)
        return "F16" if shape[-1] % QUANTS[dtype][0] else dtype
    return dtype


def mmproj_type(name: str, tensor: str, shape: tuple[int, ...], *, layer: int = 0, layers: int = 1) -> str:
    """The type of one tensor of an mmproj in a file of type `name`; `layer` is its block of `layers`.

    Patch embeddings are never quantised and positions stay float32, whatever the type: the runtime wants them so.
    K-quants are mixed as llama-quantize mixes them, which takes the tower for a model without blocks at ffn_down.
    """
    base = OUTTYPES[name].base
    if len(shape) < 2 or not tensor.endswith(".weight") or "position_embd" in tensor:
        return "F32"
    if "patch_embd" in tensor:
        return base if base not in QUANTS else "F16"
    if base not in QUANTS:
        return base
    kind = tensor.removesuffix(".weight").rpartition(".")[2]
    return fitting(_mixed(name, base, kind, shape, layer, 0 if kind == "ffn_down" else layers, {}, False), shape)
