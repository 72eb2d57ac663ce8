"""The projector's sizes, which only its tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.tensors import StoredTensor


def projector_config(weights: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Depth and sizes of a projector from its tensors: canonical names, indices counting the activations.

    Raises InputError when there is none or a linear layer is missing.
    """
    first = weights.get("projector.0.weight")
    if first is None or len(first.shape) != 2:
        raise InputError(
            "the checkpoint holds no projector (projector.0.weight)",
            hint="give a file or a model that has it by --projector, or the LLaVA that it was trained from by --base",
        )
    indices = [name.split(".")[1] for name in weights if name.count(".") == 2 and name.endswith(".weight")]
    last = max((int(i) for i in indices if i.isdecimal() and len(i) < 4), default=0)
    return {
        "model_type": "projector",
        "text_hidden_size": first.shape[0],
        "vision_hidden_size": first.shape[1],
        "steps": (last + 1) // 2,
        "depth": (last + 1) // 2 + 1,
        "bias": "projector.0.bias" in weights,
    }
