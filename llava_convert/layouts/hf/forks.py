"""Models of other code in the form of transformers' LLaVA: the same parts under other names (`[fork]` in hf.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from llava_convert.core.resources import data_dir


@cache
def forks() -> Mapping[str, Mapping[str, Any]]:
    """By model type, the keys of a fork's config: `words` for values, `named` for bases, `harmless`."""
    found = tomllib.loads((data_dir("mappings") / "layouts" / "hf.toml").read_text(encoding="utf-8")).get("fork", {})
    return dict(found)


def as_llava(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The config of a fork as transformers' LLaVA has it, `model_type` among it; any other as it is."""
    fork = forks().get(str(config.get("model_type")))
    if fork is None:
        return dict(config)
    found = {key: value for key, value in config.items() if key not in fork["harmless"]}
    for key, words in fork["words"].items():
        if key in found:
            found[key] = words.get(str(found[key]), found[key])
    for key, half in fork["named"].items():
        name, part = found.pop(key, None), found.get(half)
        if name and isinstance(part, dict) and not part.get("_name_or_path"):
            found[half] = {**part, "_name_or_path": name}
    return {**found, "model_type": model_type}
