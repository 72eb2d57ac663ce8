"""Every fact of a config that changes logits, through every layout that can state it: equal logits, by real consumers.

A source differs in one fact from the usual model of the same weights, and in its logits too, or the test would see
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import CASES, TOKENS, Models, ids_of, logits
from tests.interop.peer_programs import in_peer

# Measured: 0.0, in 4.46 and 4.57 too.
TOLERANCE = 1e-5
SHOWS = 1e-3
# What a release has no word for, with what it then says itself.
NOT_IN = {
    "4.46": {"no-biases": [f"missing_keys: multi_modal_projector.linear_{i}.bias" for i in (1, 2)]},
}
# What a release computes otherwise than this one of any config: 4.46 takes max_position_embeddings for yarn's first
# length (modeling_rope_utils.py), and looks through Qwen2's window in every layer (modeling_qwen2.py).
COMPUTED_OTHERWISE = {"4.46": ("yarn-rope", "window-of-qwen2")}
# Two forms of one function differ little.
LITTLE = {"activation-of-the-tower": 1e-4, "activation-tanh": 1e-4}


@pytest.fixture(scope="module")
def models(converted: Converter, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(converted, tmp_path_factory.mktemp("facts"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.features == 16])
def test_the_fact_shows(models: Models, pixels: torch.Tensor, name: str) -> None:
    """Another number of features shows by itself."""
    case = CASES[name]
    usual = logits(models.usual(name), pixels, case.length)
    assert gap(logits(models.source(name), pixels, case.length), usual) > LITTLE.get(name, SHOWS)


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, case in CASES.items() for to in case.to])
def test_logits_through_a_layout(models: Models, pixels: torch.Tensor, name: str, to: str) -> None:
    case = CASES[name]
    wanted = logits(models.source(name), pixels, case.length, case.features)
    found = logits(models.back(name, to), pixels, case.length, case.features)
    assert gap(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", ["window-of-qwen2", "window-of-mistral"])
def test_a_window_comes_back_from_gguf(models: Models, name: str) -> None:
    before, after = (
        json.loads((folder / "config.json").read_text())["text_config"]
        for folder in (models.source(name), models.back(name, "gguf"))
    )
    keys = ("model_type", "sliding_window", "use_sliding_window", "max_window_layers")
    assert {key: after.get(key) for key in keys} == {key: before.get(key) for key in keys}


@pytest.mark.peers
@pytest.mark.parametrize("version", ["4.46", "4.57"])
def test_logits_in_older_releases(models: Models, pixels: torch.Tensor, tmp_path: Path, version: str) -> None:
    """What we wrote for transformers, read by older ones, is what this one computes of the source."""
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    job: dict[str, Any] = {"models": {}, "pixels": str(tmp_path / "pixels.npy"), "folder": str(tmp_path)}
    apart = COMPUTED_OTHERWISE.get(version, ())
    for name, case in CASES.items():
        asked = {name: models.back(name, "hf")}
        if name in apart:
            asked[f"source-{name}"] = models.source(name)
        for each, folder in asked.items():
            ids = ids_of(AutoConfig.from_pretrained(folder), case.length, case.features)[0].tolist()
            job["models"][each] = {"folder": str(folder), "ids": ids}
    report = in_peer(f"transformers-{version}", "run_logits.py", job, tmp_path)
    assert report["version"].startswith(version)
    unread = NOT_IN.get(version, {})
    assert {name: keys for name, keys in report["keys"].items() if keys} == unread

    def theirs(name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(tmp_path / f"{name}.npy"))[:, :TOKENS]

    off = {}
    for name in CASES.keys() - unread.keys():
        case = CASES[name]
        wanted = logits(models.source(name), pixels, case.length, case.features)
        off[name] = gap(theirs(name), theirs(f"source-{name}") if name in apart else wanted)
        assert name not in apart or gap(theirs(name), wanted) > SHOWS
    assert {name: value for name, value in off.items() if value > TOLERANCE} == {}
