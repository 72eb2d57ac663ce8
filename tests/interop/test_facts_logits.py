"""Every fact of a config that changes logits, through every layout that can state it: equal logits, by real consumers.

A source differs in one fact from the usual model of the same weights, and in its logits too, or the test would see
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import TOKENS, Made, ids_of, logits, write
from tests.interop.peer_programs import in_peer

# Measured: at most 1.2e-6 of the largest logit; most are equal.
TOLERANCE = 1e-5
SHOWS = 1e-3
ALL = ("hf", "xtuner", "official", "gguf")
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# As Phi-3's configs are published, and as transformers 5.x saves them.
LISTS = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
}
LONGROPE = {"rope_scaling": {"type": "longrope", **LISTS}, "original_max_position_embeddings": 64}
LONGROPE_OF_5 = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {
        "rope_type": "longrope",
        **LISTS,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}


# What a release has no word for, with what it then says itself.
NOT_IN = {
    "4.46": {"no-biases": [f"missing_keys: multi_modal_projector.linear_{i}.bias" for i in (1, 2)]},
}


# What a release computes otherwise than this one of any config: 4.46 takes max_position_embeddings for yarn's first
# length (modeling_rope_utils.py), and looks through Qwen2's window in every layer (modeling_qwen2.py).
COMPUTED_OTHERWISE = {"4.46": ("yarn-rope", "window-of-qwen2")}


@dataclass(frozen=True)
class Case:
    """A model of one fact, the layouts that can state it, and how long a text must be to show it."""

    made: Made
    to: tuple[str, ...] = ALL
    length: int = 48
    features: int = 16


def text(**keys: Any) -> Made:
    return Made(text=keys)


CASES = {
    "activation-relu": Case(Made({"projector_hidden_act": "relu"}), ("hf", "xtuner")),
    "activation-tanh": Case(Made({"projector_hidden_act": "gelu_pytorch_tanh"}), ("hf", "xtuner")),
    "no-biases": Case(Made({"multimodal_projector_bias": False}), ("hf", "xtuner")),
    "layer-1": Case(Made({"vision_feature_layer": 1})),
    "layer-3": Case(Made({"vision_feature_layer": 3})),
    "last-layer": Case(Made({"vision_feature_layer": -1})),
    "layer-3-from-the-end": Case(Made({"vision_feature_layer": -3})),
    "every-feature": Case(Made({"vision_feature_select_strategy": "full"}), ("hf", "official"), features=17),
    "rope-theta": Case(text(rope_theta=10000.0)),
    "linear-rope": Case(text(rope_scaling=LINEAR)),
    "llama3-rope": Case(text(rope_scaling=LLAMA3), length=300),
    "yarn-rope": Case(text(rope_scaling=YARN), length=300),
    "longrope": Case(Made(text=LONGROPE, family="phi3"), ("hf", "xtuner", "official"), length=300),
    "longrope-of-5": Case(Made(text=LONGROPE_OF_5, family="phi3"), ("hf", "xtuner", "official"), length=300),
    "activation-of-words": Case(text(hidden_act="gelu"), ("hf", "xtuner", "official")),
    "norm": Case(text(rms_norm_eps=0.25)),
    "norm-of-the-tower": Case(Made(vision={"layer_norm_eps": 0.25})),
    "activation-of-the-tower": Case(Made(vision={"hidden_act": "gelu"})),
    "window-of-qwen2": Case(
        Made(text={"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, family="qwen2"),
        length=120,
    ),
    "window-of-mistral": Case(Made(text={"sliding_window": 32}, family="mistral"), length=120),
}
# Two forms of one function differ little.
LITTLE = {"activation-of-the-tower": 1e-4, "activation-tanh": 1e-4}


@dataclass
class Models:
    """Sources by the name of their case, and what became of them; each is made once."""

    converted: Converter
    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        return self._write(name, CASES[name].made)

    def usual(self, name: str) -> Path:
        """The model of the same weights without the fact."""
        made = CASES[name].made
        return self._write(f"usual-{made.family}", replace(Made(), family=made.family))

    def _write(self, name: str, made: Made) -> Path:
        if name not in self.made:
            self.made[name] = write(self.folder / name, self.converted("tiny", "hf"), made)
        return self.made[name]

    def out(self, name: str, to: str) -> Path:
        more = {"outtype": "f32", "mmproj_outtype": "f32"} if to == "gguf" else {"dtype": "float32"}
        return self.converted.onward(self.source(name), to, **more)

    def back(self, name: str, to: str) -> Path:
        """The source in another layout, and back to transformers' (or straight to it)."""
        out = self.out(name, to)
        return out if to == "hf" else self.converted.onward(out, "hf", dtype="float32")


@pytest.fixture(scope="module")
def models(converted: Converter, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(converted, tmp_path_factory.mktemp("facts"))


@pytest.mark.parametrize("name", CASES)
def test_the_fact_shows(models: Models, pixels: torch.Tensor, name: str) -> None:
    case = CASES[name]
    if case.features != 16:
        assert case.made.top["vision_feature_select_strategy"] == "full"  # another number of features
        return
    usual = logits(models.usual(name), pixels, case.length)
    assert gap(logits(models.source(name), pixels, case.length), usual) > LITTLE.get(name, SHOWS)


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, case in CASES.items() for to in case.to])
def test_logits_through_a_layout(models: Models, pixels: torch.Tensor, name: str, to: str) -> None:
    case = CASES[name]
    wanted = logits(models.source(name), pixels, case.length, case.features)
    found = logits(models.back(name, to), pixels, case.length, case.features)
    assert gap(found, wanted) <= TOLERANCE


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
