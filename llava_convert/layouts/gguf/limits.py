"""What llama.cpp's graph of an architecture computes otherwise than transformers does, whatever a file says.

What gives other numbers from the first token on is refused; what shows in long texts alone is warned of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.model.tables.families import Architecture

Config = Mapping[str, Any]
WINDOWED = ("gemma2", "gemma3_text")  # whose windows the runtime has
# models/llama.cpp, qwen2.cpp, phi3.cpp: LLM_FFN_SILU and LLM_FFN_SWIGLU; gemma2.cpp and gemma3.cpp: LLM_FFN_GELU, which
# ggml computes by tanh. No key changes either.
_ACTIVATIONS = {"gemma2": ("gelu_pytorch_tanh",), "gemma3": ("gelu_pytorch_tanh",)}
_USUAL_ACTIVATIONS = ("silu", "swish")
# Layers from one that looks at everything to the next (load_swa_pattern), and that whose heads are scaled by the width.
_PATTERNS = {"gemma2": (2, 46), "gemma3": (6, 62)}
# models/gemma2.cpp reads no output.weight; stablelm.cpp and olmo2.cpp do not take the embedding where there is none.
_NO_HEAD, _OWN_HEAD = ("gemma2",), ("stablelm", "olmo2")
# Their attn_output reads as many features as the model has (create_tensor of LLM_TENSOR_ATTN_OUT).
_COMMON_HEADS = ("qwen2", "phi3", "olmo2")
_NO_OUTPUT_BIAS = ("olmo2",)  # whose attn_output is read without one


def refuse(architecture: str, told: Iterable[str], config: Config, family: Architecture) -> None:
    """Raise UnsupportedError (exit 4) for a config that the runtime computes wrongly, or does not load.

    `told` are the config's entries that the architecture has a key for.
    """
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    known = _ACTIVATIONS.get(architecture, _USUAL_ACTIVATIONS)
    if activation not in known:
        raise UnsupportedError(
            f"the activation {activation!r} cannot be written as GGUF: llama.cpp computes only {known[0]}"
        )
    share = rotated_share(config)
    if share != 1 and "partial_rotary_factor" not in told:
        raise UnsupportedError(
            f"partial_rotary_factor {share} cannot be written as GGUF: llama.cpp's {architecture} rotates whole heads"
        )
    size, heads = family.symbol("head_dim", config), family.symbol("heads", config)
    if architecture in _PATTERNS:
        _refuse_gemma(architecture, config, size, heads)
    if architecture in _NO_HEAD and config.get("tie_word_embeddings") is False:
        raise UnsupportedError(
            f"a separate output head (tie_word_embeddings: false) cannot be written as GGUF: llama.cpp's "
            f"{architecture} uses the embedding as the head",
            hint="convert to hf or xtuner, which can hold it",
        )
    if architecture in _NO_OUTPUT_BIAS and config.get("attention_bias"):
        raise UnsupportedError(
            f"attention_bias True cannot be written as GGUF: llama.cpp's {architecture} reads no bias of attn_output",
            hint="convert to hf or xtuner, which can hold it",
        )
    if architecture in _COMMON_HEADS and size * heads != config["hidden_size"]:
        raise UnsupportedError(
            f"{heads} heads of size {size} with hidden_size {config['hidden_size']} cannot be written as GGUF: "
            f"llama.cpp's {architecture} needs heads of size hidden_size / num_attention_heads"
        )


def _refuse_gemma(architecture: str, config: Config, size: int, heads: int) -> None:
    """Raise UnsupportedError for a Gemma whose layers or scale are not those that the runtime takes by its depth."""
    every, wide = _PATTERNS[architecture]
    layers = int(config["num_hidden_layers"])
    usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    pattern = config.get("sliding_window_pattern", every)
    if (config.get("layer_types") or usual) != usual or pattern != every:
        raise UnsupportedError(
            f"layer_types cannot be written as GGUF: in llama.cpp's {architecture} every {every}th layer has full "
            "attention, and the others have sliding-window attention"
        )
    scale = _gemma_scale(config, size, heads, wide)
    if config.get("query_pre_attn_scalar", scale) != scale:
        raise UnsupportedError(
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']} cannot be written as GGUF: llama.cpp's "
            f"{architecture} with {layers} layers always uses {scale}"
        )
    unread = (
        "use_bidirectional_attention",
        "attention_bias",
        *(["attn_logit_softcapping"] * (architecture == "gemma3")),
    )
    if said := [key for key in unread if config.get(key)]:
        raise UnsupportedError(f"{said[0]} cannot be written as GGUF: llama.cpp's {architecture} does not read it")


def _gemma_scale(config: Config, size: int, heads: int, wide: int) -> int:
    """What the square root of which the runtime divides a query by."""
    return int(config["hidden_size"]) // heads if config["num_hidden_layers"] == wide else size


def implied(architecture: str, config: Config, family: Architecture) -> dict[str, int]:
    """What a config must say of a file of that architecture, since the runtime takes it by other sizes."""
    if architecture not in _PATTERNS:
        return {}
    size, heads = family.symbol("head_dim", config), family.symbol("heads", config)
    return {"query_pre_attn_scalar": _gemma_scale(config, size, heads, _PATTERNS[architecture][1])}


def has_tied_heads(architecture: str) -> bool:
    """Whether a head that is tied to the embedding need not be in the file."""
    return architecture not in _OWN_HEAD


def refuse_pictures(architecture: str) -> None:
    """Raise UnsupportedError for a language model that the runtime gives other features of a picture than it gets."""
    if architecture == "gemma2":
        raise UnsupportedError(
            "a LLaVA with Gemma-2 cannot be written as GGUF: llama.cpp scales the features of a picture like "
            "word embeddings (models/gemma2.cpp), and transformers 5.x does not",
            hint="--part llm writes the language model alone",
        )


def rotated_share(config: Config) -> float:
    """How much of a head is rotated."""
    return float(config.get("partial_rotary_factor") or 1.0)


def window(config: Config) -> int | None:
    """How far back a token looks, where that is less than the longest text: the runtime always looks back whole.

    Qwen2 and Qwen3 name a window and look through it only with `use_sliding_window`.
    """
    found = config.get("sliding_window") if config.get("model_type") not in WINDOWED else None
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
