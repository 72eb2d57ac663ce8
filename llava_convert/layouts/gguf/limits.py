"""What llama.cpp's graph of an architecture computes otherwise than transformers does, whatever a file says.

What gives other numbers from the first token on is refused; what shows in long texts alone is warned of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.model.tables.families import Architecture

Config = Mapping[str, Any]
# models/llama.cpp, qwen2.cpp, phi3.cpp: LLM_FFN_SILU and LLM_FFN_SWIGLU, which no key changes.
_ACTIVATIONS = ("silu", "swish")
# Their attn_output reads as many features as the model has (create_tensor of LLM_TENSOR_ATTN_OUT).
_COMMON_HEADS = ("qwen2", "phi3")


def refuse(architecture: str, told: Iterable[str], config: Config, family: Architecture) -> None:
    """Raise UnsupportedError (exit 4) for a config that the runtime computes wrongly, or does not load.

    `told` are the config's entries that the architecture has a key for.
    """
    activation = config.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the activation {activation!r} cannot be written as GGUF: llama.cpp computes silu alone"
        )
    share = rotated_share(config)
    if share != 1 and "partial_rotary_factor" not in told:
        raise UnsupportedError(
            f"partial_rotary_factor {share} cannot be written as GGUF: llama.cpp's {architecture} rotates whole heads"
        )
    size, heads = family.symbol("head_dim", config), family.symbol("heads", config)
    if architecture in _COMMON_HEADS and size * heads != config["hidden_size"]:
        raise UnsupportedError(
            f"{heads} heads of {size} on {config['hidden_size']} features cannot be written as GGUF: llama.cpp's "
            f"{architecture} wants heads of hidden_size / num_attention_heads"
        )


def rotated_share(config: Config) -> float:
    """How much of a head is rotated."""
    return float(config.get("partial_rotary_factor") or 1.0)


def window(config: Config) -> int | None:
    """How far back a token looks, where that is less than the longest text: the runtime always looks back whole.

    Qwen2 and Qwen3 name a window and look through it only with `use_sliding_window`.
    """
    found = config.get("sliding_window")
    used = config.get("use_sliding_window", config.get("model_type") not in ("qwen2", "qwen3"))
    return found if used and isinstance(found, int) and found < config.get("max_position_embeddings", 0) else None


def warnings(config: Config) -> list[str]:
    """What the runtime does otherwise in long texts."""
    said = []
    if (found := window(config)) is not None:
        said.append(
            f"llama.cpp knows no sliding window here: in texts of more than {found} tokens answers differ from the "
            "model's"
        )
    scaling = config.get("rope_scaling") or {}
    if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
        said.append(
            f"llama.cpp does not compute the rope scaling 'dynamic': in texts of more than "
            f"{config['max_position_embeddings']} tokens answers differ from the model's"
        )
    return said
