"""The vision tower's activation in an mmproj file, and what its keys say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.storage.gguf.file import Typed

# clip.cpp: neither flag is x·sigmoid(1.702x); use_gelu is GELU by tanh, use_silu is SiLU. GELU by erf is written as the
# former, which is as near as the runtime comes (a thousandth).
_FLAGS = {
    "quick_gelu": None,
    "gelu": "use_gelu",
    "gelu_new": "use_gelu",
    "gelu_pytorch_tanh": "use_gelu",
    "silu": "use_silu",
}
_READ = {"use_gelu": "gelu", "use_silu": "silu"}


def activation_keys(config: Mapping[str, Any]) -> dict[str, Typed]:
    """The flags of a tower's `hidden_act`. Raises UnsupportedError for one that clip.cpp does not compute."""
    name = str(config.get("hidden_act", "quick_gelu"))
    if name not in _FLAGS:
        raise UnsupportedError(f"the tower's activation {name!r} cannot be computed by llama.cpp")
    return {f"clip.{flag}": Typed("bool", flag == _FLAGS[name]) for flag in ("use_gelu", "use_silu")}


def config_of_activation(metadata: Mapping[str, Typed]) -> dict[str, Any]:
    """`hidden_act`, and what every CLIP tower has."""
    for flag, name in _READ.items():
        typed = metadata.get(f"clip.{flag}")
        if typed is not None and typed.value is True:
            return {"hidden_act": name, "num_channels": 3}
    return {"hidden_act": "quick_gelu", "num_channels": 3}
