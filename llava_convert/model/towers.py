"""Published vision towers whose configs are known, so that nothing need be fetched for them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from llava_convert.core.resources import data_dir
from llava_convert.core.tensors import StoredTensor
from llava_convert.model.checkpoint import VISION
from llava_convert.model.configs import family, named_config


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
    """The config of a whole tower from its shapes: the one an earlier conversion recorded, else a published one's."""
    if recorded is not None and fits(recorded, weights):
        return dict(recorded)
    found = next((name for name, config in towers().items() if fits(config, weights)), None)
    return None if found is None else {**towers()[found], "_name_or_path": found}


def id_by_shape(config: Mapping[str, Any]) -> str | None:
    """The published tower that a config describes, when every dimension is the same."""
    return next((name for name, known in towers().items() if all(config.get(k) == known[k] for k in known)), None)
