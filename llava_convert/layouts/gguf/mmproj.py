"""What an mmproj says: which tower and projector it holds, and which layer's features the projector reads.

The keys are those of llama.cpp's `clip_model_loader` (tools/mtmd/clip.cpp). A GGUF never has the tower's last layer
norm: where it is present the runtime applies it, and LLaVA's features are taken before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.assets.processor import preprocessor_config
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import printable, to_json
from llava_convert.model.checkpoint import VISION
from llava_convert.model.facts import ASPECT, MERGE, PINPOINTS
from llava_convert.model.towers import towers
from llava_convert.ops.base import Op
from llava_convert.ops.rows import constant
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sidecars import Sidecars, made_sidecars

PROJECTORS = ("mlp",)
FEATURE_LAYER = "clip.vision.feature_layer"
_POST_LAYERNORM = f"{VISION}.vision_model.post_layernorm"
Metadata = Mapping[str, Typed]


def require_llava(metadata: Metadata, where: Path) -> None:
    """Raises UnsupportedError (exit 4) for an mmproj of another projector than LLaVA's."""
    kind = value(metadata, "clip.projector_type", value(metadata, "clip.vision.projector_type", "mlp"))
    if kind not in PROJECTORS:
        raise UnsupportedError(
            f"{printable(where)}: the projector has type {printable(kind)}, but LLaVA's has type mlp",
            hint="this tool converts LLaVAs: a CLIP or SigLIP tower and an MLP",
        )
    if value(metadata, "clip.has_vision_encoder", True) is not True:
        raise UnsupportedError(f"{printable(where)}: it holds no vision tower (clip.has_vision_encoder is false)")


def value(metadata: Metadata, key: str, default: Any = None) -> Any:
    """What a key says, `default` where it is absent."""
    found = metadata.get(key)
    return default if found is None else found.value


def with_legacy_names(tensors: Mapping[str, StoredTensor], width: int) -> dict[str, StoredTensor]:
    """The tensors by today's names; the legacy writer called the layer that widens, `ffn_up`, `ffn_down`.

    The runtime tells by the shape, and so can it be told here: the layer that widens reads `width` features. Where
    both sizes are equal the new names are taken.
    """
    swapped: dict[str, str] = {"model.image_newline": "v.image_newline"}
    for name, tensor in tensors.items():
        head, found, _ = name.partition(".ffn_down.")
        if found and name.endswith(".weight") and tensor.shape[-1:] == (width,) and tensor.shape[0] != width:
            for end in ("weight", "bias"):
                swapped |= {f"{head}.ffn_down.{end}": f"{head}.ffn_up.{end}"}
                swapped |= {f"{head}.ffn_up.{end}": f"{head}.ffn_down.{end}"}
    return {swapped.get(name, name): tensor for name, tensor in tensors.items()}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's config with the width of CLIP's text projection, which a GGUF cannot tell, from its published one."""
    known = _published(config)
    return {**config, "projection_dim": known["projection_dim"]} if known and "projection_dim" in known else {**config}


def _published(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The published tower of this width and picture, whatever its depth."""
    same = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    return next((known for known in towers().values() if all(known.get(k) == config.get(k) for k in same)), None)


def feature_layer(metadata: Metadata, config: Mapping[str, Any], where: Path) -> tuple[int, str]:
    """Which hidden state the projector reads, counted from the end, and a note on how that is known.

    Raises UnsupportedError where there are several, InputError for a layer that the tower does not have.
    """
    blocks = int(config["num_hidden_layers"])
    said = value(metadata, FEATURE_LAYER)
    if said is not None:
        layers = list(said) if isinstance(said, list | tuple) else [said]
        if len(layers) != 1:
            raise UnsupportedError(f"{printable(where)}: {FEATURE_LAYER} is {layers}: only one layer can be converted")
        layer = int(layers[0])
        if not 0 <= layer <= blocks:
            raise InputError(f"{printable(where)}: {FEATURE_LAYER} is {layer}, and the tower has {blocks} blocks")
        return layer - blocks - 1, ""
    known = _published(config)
    if known is not None and known["num_hidden_layers"] == blocks:
        return -2, (
            f"{where.name} does not say which layer the projector reads ({FEATURE_LAYER}), and its tower has all "
            f"{blocks} blocks: taken to be the last but one, as LLaVA trains"
        )
    return -1, (
        f"{where.name} does not say which layer the projector reads ({FEATURE_LAYER}): taken to be the last of its "
        f"{blocks} blocks, since writers leave out those after it"
    )


def next_facts(metadata: Metadata) -> dict[str, Any]:
    """What a LLaVA-NeXT says of how it cuts pictures, by the names of the facts; {} for LLaVA 1.5.

    The pinpoints are a flat array of widths and heights.
    """
    flat = value(metadata, "clip.vision.image_grid_pinpoints")
    if not flat:
        return {}
    merge = value(metadata, "clip.vision.mm_patch_merge_type", "flat")
    pairs = [list(pair) for pair in zip(flat[::2], flat[1::2], strict=False)]
    return {ASPECT: "anyres", PINPOINTS: pairs, MERGE: merge}


def synthetic(config: Mapping[str, Any]) -> dict[str, tuple[StoredTensor, tuple[Op, ...]]]:
    """The tower's last layer norm as identity, for the classes which want one to load."""
    shape = (int(config["hidden_size"]),)
    return {
        f"{_POST_LAYERNORM}.{end}": constant(f"{_POST_LAYERNORM}.{end}", shape, (fill,))
        for end, fill in (("weight", 1.0), ("bias", 0.0))
    }


def processor_sidecars(metadata: Metadata, config: Mapping[str, Any], where: Path) -> Sidecars:
    """preprocessor_config.json, as far as the file says other things than CLIP's own.

    Its numbers are float32, of which no rule makes the published decimals again: those are known.
    """
    usual = preprocessor_config(None, config, kind="clip", for_hf=False)
    said = {key: value(metadata, f"clip.vision.{key}") for key in ("image_mean", "image_std")}
    own = {
        key: [float(str(np.float32(number))) for number in numbers]
        for key, numbers in said.items()
        if numbers is not None and not np.array_equal(np.float32(numbers), np.float32(usual[key]))
    }
    return made_sidecars(where, lambda: {"preprocessor_config.json": to_json(own)})
