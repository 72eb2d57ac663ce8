"""Rotary embeddings that are scaled: what GGUF says of them in metadata and in tensors of factors.

Llama-3.1's scaling is a tensor `rope_freqs.weight` with one factor a frequency and nothing else (convert_hf_to_gguf,
LlamaModel.generate_extra_tensors); Phi-3's is two such tensors; "linear" and "yarn" are keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.gguf.limits import rotated_share
from llava_convert.model.checkpoint import LLM
from llava_convert.model.configs import longrope_attention
from llava_convert.model.tables.families import architecture_for
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

Config = Mapping[str, Any]
LLAMA3_TENSOR = "rope_freqs.weight"
PHI3_TENSORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
# (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of the models that there are:
# Llama 3.1 and 3.3; Llama 3.2; and what fine-tunes made of them.
_PUBLISHED = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 8192), (16.0, 1.0, 1.0, 8192))
PHI3 = "phi3"
# It does nothing up to max_position_embeddings, and the runtime does nothing beyond: `limits.warnings` tells of it.
DYNAMIC = "dynamic"
_LONGROPE = "longrope"
_YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
# What llama.cpp's yarn does whatever a file says.
_YARN_FIXED = {
    "beta_fast": (32, "where the ramp begins"),
    "beta_slow": (1, "where the ramp ends"),
    "truncate": (True, "whether the ramp's ends are rounded"),
}


def kind_of(scaling: Mapping[str, Any] | None) -> str:
    """The name of a scaling; "default" for none."""
    return str((scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default").lower()


def scaling_keys(architecture: str, config: Config) -> dict[str, Typed]:
    """The keys of a config's scaling. Raises UnsupportedError (exit 4) for what llama.cpp does not compute."""
    scaling = config.get("rope_scaling") or {}
    kind = kind_of(scaling)
    prefix = f"{architecture}.rope.scaling"
    if kind in ("default", DYNAMIC) or (kind == "llama3" and architecture == "llama"):
        return {}
    if architecture == PHI3:
        if kind == _LONGROPE:
            return {f"{prefix}.attn_factor": Typed("f32", _phi3_attention(config))}
    elif kind in ("linear", "yarn"):
        found = {f"{prefix}.type": Typed("str", kind), f"{prefix}.factor": Typed("f32", _factor(config))}
        return found | (_yarn_keys(prefix, config) if kind == "yarn" else {})
    known = {"llama": "llama3, linear, yarn", PHI3: "longrope"}.get(architecture, "linear, yarn")
    raise UnsupportedError(
        f"rope scaling {kind!r} cannot be written as GGUF: llama.cpp's {architecture} does not compute it",
        hint=f"known: {known}; without rope_scaling in its config.json the model can be written, for texts up to the "
        "length that it was trained for",
    )


def _yarn_keys(prefix: str, config: Config) -> dict[str, Typed]:
    """What transformers' yarn is told beside the factor, as far as llama.cpp reads it.

    Its llama and qwen2 take the ramp's ends from no key (the two betas are read for other architectures only), and
    always round them. yarn_attn_factor, by which the reference converter writes the attention factor, is not read
    either: attn_factor is, by which the 1 + 0.1 ln(factor) of the runtime's own is multiplied (llama-context.cpp).
    """
    scaling = config["rope_scaling"]
    for name, (built_in, meaning) in _YARN_FIXED.items():
        if scaling.get(name) is not None and scaling[name] != built_in:
            raise UnsupportedError(
                f"rope scaling yarn with {name} {scaling[name]} ({meaning}) cannot be written as GGUF: llama.cpp "
                f"always uses {str(built_in).lower()}"
            )
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    found = {f"{prefix}.original_context_length": Typed("u32", original)}
    for name, key in _YARN.items():
        if scaling.get(name) is not None:
            found[f"{prefix}.{key}"] = Typed("f32", float(scaling[name]))
    usual = _mscale(_factor(config))
    attention = _yarn_attention(scaling, _factor(config))
    if attention != usual:
        found[f"{prefix}.attn_factor"] = Typed("f32", attention / usual)
    return found


def _factor(config: Config) -> float:
    """The scaling's factor, which yarn may leave to the two lengths. Raises InputError where nothing tells it."""
    scaling = config["rope_scaling"]
    stated, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if stated is None and original and kind_of(scaling) == "yarn":
        stated = config["max_position_embeddings"] / original
    if not isinstance(stated, int | float) or not stated > 0:
        raise InputError(
            f"config.json: the factor of rope scaling {kind_of(scaling)!r} should be a number above 0, found {stated!r}"
        )
    return float(stated)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    """What transformers multiplies the cosines and sines by (modeling_rope_utils.py, _compute_yarn_parameters)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _phi3_attention(config: Config) -> float:
    """As transformers: by the two lengths, unless the config says it."""
    stated = config["rope_scaling"].get("attention_factor")
    if stated is not None:
        return float(stated)
    return longrope_attention(config["max_position_embeddings"], config["original_max_position_embeddings"])


def factor_tensors(architecture: str, config: Config) -> dict[str, tuple[float, ...]]:
    """The tensors of factors that a config's scaling makes, by GGUF name: (half the head size,) float32 each."""
    scaling = config.get("rope_scaling") or {}
    kind = kind_of(scaling)
    if kind == "llama3":
        head = architecture_for(LLM, str(config["model_type"])).symbol("head_dim", config)
        numbers = (
            float(scaling.get("factor", 8.0)),
            float(scaling.get("low_freq_factor", 1.0)),
            float(scaling.get("high_freq_factor", 4.0)),
            int(scaling.get("original_max_position_embeddings", 8192)),
        )
        factors = llama3_factors(float(config.get("rope_theta", 10000.0)), head, *numbers)
        return {LLAMA3_TENSOR: tuple(factors.tolist())}
    if architecture == PHI3 and kind == _LONGROPE:
        size = architecture_for(LLM, str(config["model_type"])).symbol("head_dim", config)
        count = int(size * rotated_share(config)) // 2
        return {tensor: _numbers(scaling.get(name), name, count) for name, tensor in PHI3_TENSORS.items()}
    return {}


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    """Raises InputError for another number of factors than there are frequencies: the runtime refuses the file."""
    if not isinstance(value, list) or len(value) != count or not all(isinstance(one, int | float) for one in value):
        found = f"{len(value)} of them" if isinstance(value, list) else repr(value)
        raise InputError(f"config.json: {name} of the rope scaling should be {count} numbers, found {found}")
    return tuple(map(float, value))


def llama3_factors(
    base: float, head: int, factor: float, low: float, high: float, original: int
) -> NDArray[np.float32]:
    """What each of the head / 2 frequencies is divided by: 1 for the fast ones, `factor` for the slow ones.

    In float32, in the order of the reference converter's operations (a quotient is a product with a reciprocal there);
    only the powers are rounded from float64, where its float32 power can be off by a unit in the last place.
    """
    one = np.float32(1)
    exponents = (np.arange(0, head, 2, dtype=np.float32) / np.float32(head)).astype(np.float64)
    frequencies = one / np.power(base, exponents).astype(np.float32)
    waves = (one / frequencies) * np.float32(2 * math.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        smooth = ((one / waves) * np.float32(original) - np.float32(low)) / np.float32(high - low)
        between = one / ((one - smooth) / np.float32(factor) + smooth)
    slow = np.where(waves > np.float32(original / low), np.float32(factor), between)
    return np.where(waves < np.float32(original / high), one, slow).astype(np.float32)


def read_scaling(
    architecture: str, metadata: Mapping[str, Typed], tensors: Mapping[str, StoredTensor], config: Config, head: int
) -> dict[str, Any] | None:
    """The config's `rope_scaling` of a file, None for none.

    Llama-3.1's parameters are in no file: those are taken whose factors are the file's. Raises UnsupportedError where
    none are.
    """
    prefix = f"{architecture}.rope.scaling"
    if LLAMA3_TENSOR in tensors:
        return _recognised(_values(tensors[LLAMA3_TENSOR]), config, head)
    if all(name in tensors for name in PHI3_TENSORS.values()):
        lists = {name: _decimals(_values(tensors[tensor])) for name, tensor in PHI3_TENSORS.items()}
        return {**lists, "type": _LONGROPE} | _phi3_stated(metadata.get(f"{prefix}.attn_factor"), config)
    kind = metadata.get(f"{prefix}.type")
    if kind is None or kind.value in ("none", _LONGROPE):
        return None
    if kind.value not in ("linear", "yarn"):
        raise UnsupportedError(f"rope scaling {kind.value!r} of the GGUF is not known")
    found: dict[str, Any] = {"type": kind.value, "rope_type": kind.value}
    named = {"factor": "factor", **(_YARN if kind.value == "yarn" else {})}
    for name, key in named.items():
        if (typed := metadata.get(f"{prefix}.{key}")) is not None:
            found[name] = _shortest(typed.value)
    if kind.value == "yarn" and (typed := metadata.get(f"{prefix}.original_context_length")) is not None:
        found["original_max_position_embeddings"] = typed.value
    if kind.value == "yarn" and (typed := metadata.get(f"{prefix}.attn_factor")) is not None:
        found.setdefault("attention_factor", _shortest(typed.value * _mscale(found["factor"])))
    return found


def _phi3_stated(attention: Typed | None, config: Config) -> dict[str, float]:
    """The attention factor of a file, where it is not what the two lengths give."""
    usual = _phi3_attention({**config, "rope_scaling": {}})
    if attention is None or math.isclose(attention.value, usual, rel_tol=1e-6):
        return {}
    return {"attention_factor": _shortest(attention.value)}


def _recognised(factors: NDArray[np.float32], config: Config, head: int) -> dict[str, Any]:
    base = float(config.get("rope_theta", 10000.0))
    candidates = [*_PUBLISHED, *_solved(base, head, factors)]
    for numbers in candidates:
        made = llama3_factors(base, head, *numbers)
        if made.shape == factors.shape and np.allclose(made, factors, rtol=3e-7, atol=0):
            factor, low, high, original = numbers
            return {
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
                "rope_type": "llama3",
            }
    raise UnsupportedError(
        "the factors in rope_freqs.weight do not fit any known rope scaling",
        hint="give the original language model by --llm: its config has the rope scaling",
    )


def _solved(base: float, head: int, factors: NDArray[np.float32]) -> list[tuple[float, float, float, int]]:
    """Parameters that would give such factors: the slow end tells the factor, what lies between tells the rest.

    Only the ratios of the training length to the two others matter, so `low` is 1. Between the ends the inverse factor
    is linear in the frequency; with a single point there, or none, `high` is taken to be 4 and the length a power of 2.
    """
    slowest = float(factors[-1])
    found = [(slowest, 1.0, 4.0, 1 << n) for n in range(3, 21)]
    between = (factors > 1) & (factors < slowest)
    if slowest > 1 and factors.shape == (head // 2,) and np.count_nonzero(between) > 1:
        frequencies = base ** -(np.arange(0, head, 2) / head)[between] / (2 * math.pi)
        smooth = (1 / factors[between].astype(np.float64) - 1 / slowest) / (1 - 1 / slowest)
        slope, offset = np.polyfit(frequencies, smooth, 1)
        if slope > 0 > offset:
            found.append((slowest, 1.0, round(1 - 1 / float(offset), 3), round(-float(slope / offset))))
    return found


def _values(tensor: StoredTensor) -> NDArray[np.float32]:
    with FilePool() as pool:
        return read_whole(pool, tensor).astype(np.float32)


def _decimals(values: NDArray[np.float32]) -> list[float]:
    return [_shortest(value) for value in values]


def _shortest(value: float | np.float32) -> float:
    """Of a float32 the shortest decimal that means it."""
    return float(str(np.float32(value)))
