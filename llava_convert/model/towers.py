"""Published vision towers whose configs are known, so that nothing need be fetched for them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from llava_convert.core.resources import data_dir
from llava_convert.core.tensors import StoredTensor
from llava_convert.model.checkpoint import VISION
from llava_convert.model.configs import family, has_head, named_config, without_last_block


@cache
def towers() -> Mapping[str, dict[str, Any]]:
    """Hub id → config, complete."""
    path = data_dir("mappings") / "towers.toml"
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: named_config(config, VISION, where=path.name) for name, config in raw.items()}


def fits(config: Mapping[str, Any], weights: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensors are all those of a tower of this config, each in its shape."""
    expected = family(VISION, config).tensors(config)
    return {name: want.shape for name, want in expected.items()} == {n: t.shape for n, t in weights.items()}


def tower_config(weights: Mapping[str, StoredTensor], recorded: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The config of a whole tower from its shapes: the one an earlier conversion recorded, else a published one's.

    A tower may have been cut, as LLaVA-NeXT's code does.
    """
    known = {} if recorded is None else {None: recorded}
    for name, config in (known | dict(towers())).items():
        forms = (config, without_last_block(config)) if "vision_use_head" in config else (config,)
        form = next((form for form in forms if fits(form, weights)), None)
        if form is not None:
            return dict(form) if name is None else {**form, "_name_or_path": name}
    return None


def id_by_shape(config: Mapping[str, Any]) -> str | None:
    """The published tower that a config describes, when every dimension is the same, whole or cut."""
    blocks = config.get("num_hidden_layers", 0)
    whole = {**config, "num_hidden_layers": blocks + 1, "vision_use_head": True}
    for name, known in towers().items():
        forms = (config,) if has_head(config) else (config, whole)
        if any(all(form.get(key) == known[key] for key in known) for form in forms):
            return name
    return None
