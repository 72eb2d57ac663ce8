"""Model configs as plain dicts, read in every flavour and kept in the old one.

The old flavour (`torch_dtype`, `rope_theta` and `rope_scaling`, every dimension written out) is what transformers
4.37 to 5.x all read rightly; a 5.x config read by 4.x silently gets rope_theta 10000.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.model.tables.families import Architecture, architecture_for, architectures

# Written by save_pretrained about itself, or only meant for the class that it came from.
_STALE = ("transformers_version", "architectures", "auto_map", "_attn_implementation_autoset", "_commit_hash")


def old_flavour(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in transformers' 4.x spelling, whatever version wrote it."""
    found = dict(config)
    dtype = found.pop("dtype", None)
    if dtype is not None:
        found.setdefault("torch_dtype", dtype)
    rope = found.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = dict(rope)
        for key in ("rope_theta", "partial_rotary_factor"):  # both stand by themselves in 4.x
            if key in scaling:
                found.setdefault(key, scaling.pop(key))
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            found.setdefault("rope_scaling", None)
        else:
            found.setdefault("rope_scaling", scaling)
    return found


def named_config(config: Mapping[str, Any], part: str, *, where: str) -> dict[str, Any]:
    """A part's config with the defaults of its family filled in. Raises InputError without a model_type."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{where}: model_type is missing")
    return architecture_for(part, kind).complete(config)


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


def without_stale(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config less what its writer said of itself."""
    return {k: v for k, v in config.items() if k not in _STALE}


def ordered(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sorted by key, as transformers writes configs."""
    return {key: config[key] for key in sorted(config)}
