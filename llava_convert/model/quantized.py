"""Weights that other programs quantised: named by the method, refused, or made floats of where they are FP8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.arrays import FLOATS, FP8
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import QUANTS
from llava_convert.model.checkpoint import PART_NAMES, Checkpoint, Dropped, Part
from llava_convert.model.tables.quantization import CONFIG_KEYS, Quantization, quantization
from llava_convert.ops.base import Op
from llava_convert.ops.fp8 import DequantizeFp8

_BLOCK = (128, 128)  # of rows and columns for one scale, where a config does not say it: DeepSeek-V3's


def packed(part: Part) -> list[str]:
    """The names of a part's tensors that hold no floats of 16 bits or more, and are no blocks of ggml's."""
    return [name for name, tensor in part.weights.items() if tensor.dtype not in FLOATS and tensor.dtype not in QUANTS]


def with_quantization(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, beside: Mapping[str, Mapping[str, Any]]
) -> Checkpoint:
    """The checkpoint with what its config, the files beside it and its tensors say of its quantisation.

    A config may speak of one that the weights have not: that of the base that an adapter was trained on, or one that
    somebody undid. Either way its outputs hold floats, so that the key goes.
    """
    parts = {name: replace(part, config=_plain(part.config)) for name, part in checkpoint.parts.items()}
    keys = {key: value for key, value in checkpoint.unknown_keys.items() if key not in CONFIG_KEYS}
    found = replace(checkpoint, parts=parts, unknown_keys=keys)
    held = {name for part in checkpoint.parts.values() for name in packed(part)}
    names = (name for part in checkpoint.parts.values() for name in part.weights)
    said = quantization(config or {}, beside, names)
    if held:
        return replace(found, quantization=said)
    if said is None or not said.config:
        return found
    note = f"the config says that the model is quantised ({said}), and its weights here are floats: they are taken"
    return replace(found, notes=(*found.notes, note))


def _plain(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if config is None else {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def can_dequantize(checkpoint: Checkpoint) -> bool:
    """Whether floats can be made of what is quantised: all of it is FP8 of a method with scales, or without any."""
    how = checkpoint.quantization
    kinds = {part.weights[name].dtype for part in checkpoint.parts.values() for name in packed(part)}
    return how is not None and bool(how.method.scales) and kinds <= set(FP8)


def refuse_packed(checkpoint: Checkpoint, parts: Iterable[str]) -> None:
    """Raise UnsupportedError (exit 4) where weights of these parts are quantised, with the method's name first."""
    how = checkpoint.quantization
    for part in parts if how is not None else ():
        own = checkpoint.parts[part]
        held = packed(own)
        if not held:
            continue
        why = f"{len(held)} of the {len(own.weights)} tensors of the {PART_NAMES[part]} are packed"
        if how is not None and how.method.name == "bitsandbytes" and not any("absmax" in n for n in own.weights):
            why += ", and the scales (absmax) that would unpack them are missing"
        hint = "give the full-precision model that it was made of"
        if can_dequantize(checkpoint):
            hint = f"--dequantize turns them into floats, which keep the quantisation error; better {hint}"
        raise UnsupportedError(f"{checkpoint.path} is quantised ({how}): {why}", hint=hint)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with FP8 weights as value times scale, in float64. Raises nothing where there are none."""
    how = checkpoint.quantization
    if how is None or not can_dequantize(checkpoint):
        return checkpoint
    dropped: list[Dropped] = []
    parts: dict[str, Part] = {}
    for name, part in checkpoint.parts.items():
        scales = {
            weight: next((weight + end for end in how.method.scales if weight + end in part.weights), None)
            for weight in packed(part)
        }
        idle = {one for one in part.weights if one.endswith(how.method.idle)}
        dropped += [Dropped(one, "what only a runtime of FP8 reads") for one in sorted(idle)]
        gone = {*idle, *filter(None, scales.values())}
        ops: dict[str, tuple[Op, ...]] = {
            weight: (DequantizeFp8(part.weights[scale] if scale else None, _block(how) if scale else None),)
            for weight, scale in scales.items()
        }
        weights = {one: tensor for one, tensor in part.weights.items() if one not in gone}
        parts[name] = replace(part, weights=weights, ops={**part.ops, **ops})
    note = f"FP8 weights ({how}) are turned into floats, which keep the quantisation error"
    found = replace(checkpoint, parts=parts, quantization=None, notes=(*checkpoint.notes, note))
    return replace(found, dropped=(*checkpoint.dropped, *dropped))


def _block(how: Quantization) -> tuple[int, int]:
    """The rows and columns that one scale is for, where scales stand for blocks."""
    for said in (how.config, *_groups(how.config)):
        size = said.get("weight_block_size") or said.get("block_structure")
        if isinstance(size, str):
            size = [int(word) for word in size.split("x") if word.isdecimal()]
        if isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size):
            return size[0], size[1]
    return _BLOCK


def _groups(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """What compressed-tensors says of the weights of each group of modules."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights
