"""What an mmproj file says of its vision tower beside sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.model.tables.families import Architecture
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


def refuse(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a tower that clip.cpp takes for one of an older writer's."""
    if config["hidden_size"] == config["intermediate_size"]:
        raise UnsupportedError(
            f"a tower with intermediate_size equal to hidden_size ({config['hidden_size']}) cannot be written as GGUF: "
            "llama.cpp then treats ffn_up and ffn_down as swapped"
        )


def config_of_rest(metadata: Mapping[str, Typed], family: Architecture) -> dict[str, Any]:
    """`hidden_act`, and what a tower of the family has in every mmproj: colours, and no head."""
    flags = (name for flag, name in _READ.items() if (typed := metadata.get(f"clip.{flag}")) and typed.value is True)
    activation = next(flags, "quick_gelu")
    found: dict[str, Any] = {"hidden_act": activation, "num_channels": 3}
    if "vision_use_head" in family.defaults:
        found["vision_use_head"] = False
    own = family.defaults["hidden_act"]
    if own in _FLAGS and _FLAGS[own] == _FLAGS[activation]:
        found["hidden_act"] = own  # of the names of one function that which the family's configs have
    return found
