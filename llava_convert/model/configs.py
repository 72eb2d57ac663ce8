"""Model configs as plain dicts, read in every flavour and kept in the old one.

The old flavour (`torch_dtype`, `rope_theta` and `rope_scaling`, every dimension written out) is what transformers
4.37 to 5.x all read rightly; a 5.x config read by 4.x silently gets rope_theta 10000.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.model.tables.families import Architecture, architecture_for, architectures

# Written by save_pretrained about itself, or only meant for the class that it came from.
_STALE = ("transformers_version", "architectures", "auto_map", "_attn_implementation_autoset", "_commit_hash")


def old_flavour(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in transformers' 4.x spelling, whatever version wrote it.

    Raises UnsupportedError (exit 4) where the two spellings stand side by side and differ: 4.x reads one model, 5.x
    another.
    """
    found = dict(config)
    dtype = found.pop("dtype", None)
    if dtype is not None:
        found.setdefault("torch_dtype", dtype)
    rope = found.pop("rope_parameters", None)
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        # 5.x has one for each kind of layer, of which 4.x names the base of the local ones apart.
        local = rope.get("sliding_attention") or {}
        if (said := local.get("rope_theta")) is not None:
            _put(found, "rope_local_base_freq", said)
        rope = rope["full_attention"]
    if isinstance(rope, dict):
        scaling = dict(rope)
        for key in ("rope_theta", "partial_rotary_factor"):  # both stand by themselves in 4.x
            if (said := scaling.pop(key, None)) is not None:
                _put(found, key, said)
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            found.setdefault("rope_scaling", None)
        elif found.get("rope_scaling") is None:  # which 5.x reads as nothing said
            found["rope_scaling"] = scaling
    return found


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    if config.get(key) is None:
        config[key] = value
    elif config[key] != value:
        raise UnsupportedError(
            f"config.json: {key} is {config[key]!r}, but {value!r} in rope_parameters: transformers 4.x reads the "
            "first value, and 5.x reads the second",
            hint="put the value that the model was trained with into both",
        )


def named_config(config: Mapping[str, Any], part: str, *, where: str) -> dict[str, Any]:
    """A part's config with the defaults of its family filled in. Raises InputError without a model_type."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{where}: model_type is missing")
    table = architecture_for(part, kind)
    return _strict_scaling(table.scaling, config, table.complete(config))


def _strict_scaling(rule: Mapping[str, Any], config: Mapping[str, Any], complete: dict[str, Any]) -> dict[str, Any]:
    """The complete config with a rope scaling of no other fields than its family's class takes.

    The length that the model was first trained for stands beside it, as in every release; of the attention factor and
    the scaling factor, which only 5.x writes and reads, only what the two lengths do not give stays.
    """
    scaling = config.get("rope_scaling")
    if not rule or not isinstance(scaling, Mapping):
        return complete
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind != rule["type"] and kind not in rule["former_types"]:
        return complete
    found, original = dict(complete), scaling.get("original_max_position_embeddings")
    if config.get("original_max_position_embeddings") is None and original is not None:
        found["original_max_position_embeddings"] = original
    own = {"type": rule["type"], **{key: scaling[key] for key in rule["fields"][1:] if key in scaling}}
    attention = _attention(scaling, found)
    found["rope_scaling"] = own if attention is None else {**own, "attention_factor": attention}
    return found


def _attention(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """The factor of cosines and sines that a longrope states, None where it is what the two lengths give.

    From transformers 5.23's modeling_rope_utils.py (_compute_longrope_parameters): `attention_factor`, else made of
    `factor`, else of the lengths. Raises InputError for a length that no model was trained for.
    """
    stated, factor = scaling.get("attention_factor"), scaling.get("factor")
    if stated is None and factor is None:
        return None
    lengths = (config["max_position_embeddings"], config["original_max_position_embeddings"])
    found = float(stated) if stated is not None else longrope_attention(*lengths, factor=factor)
    return None if math.isclose(found, longrope_attention(*lengths), rel_tol=1e-6) else found


def longrope_attention(longest: int, original: int, *, factor: float | None = None) -> float:
    """What longrope multiplies cosines and sines by, from two lengths in tokens, or `factor` instead of their ratio.

    Raises InputError for an `original` that no model is trained for.
    """
    if original < 2:
        raise InputError(f"config.json: original_max_position_embeddings is {original}: no model is trained for that")
    scale = longest / original if factor is None else factor
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def family(part: str, config: Mapping[str, Any]) -> Architecture:
    return architecture_for(part, str(config["model_type"]))


def kinds_that_fit(part: str, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The model types of a part whose tensors, for this config, are the ones of these canonical names."""
    there = set(names)
    found: list[str] = []
    for table in architectures().values():
        if table.part != part:
            continue
        with suppress(InputError):  # a config of another family may lack a size
            expected = table.tensors(table.complete(config))
            if there <= expected.keys() and all(name in there or want.tied for name, want in expected.items()):
                found += table.model_types
    return found


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a tower has SigLIP's head; its config says where not."""
    return bool(config.get("vision_use_head", True))


def without_last_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tower less its last block and head, as LLaVA-NeXT's code cuts a SigLIP (siglip_encoder.py)."""
    return {**config, "num_hidden_layers": int(config["num_hidden_layers"]) - 1, "vision_use_head": False}


def without_stale(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config less what its writer said of itself."""
    return {k: v for k, v in config.items() if k not in _STALE}


def ordered(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sorted by key, as transformers writes configs."""
    return {key: config[key] for key in sorted(config)}
