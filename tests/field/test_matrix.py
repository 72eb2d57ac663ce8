"""Each family, one key of its config at a time at a value other than its default, to each layout and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llava_convert
from llava_convert.core.errors import UnsupportedError
from llava_convert.model.checkpoint import LLM
from llava_convert.model.tables.families import architecture_for
from tests.field.conftest import Models, edit

COMMON: dict[str, Any] = {
    "rope_theta": 12345.0,
    "rms_norm_eps": 3e-4,
    "max_position_embeddings": 777,
    "hidden_act": "gelu",
    "rope_scaling": {"type": "linear", "factor": 2.0, "rope_type": "linear"},
}
KEYS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True},
    "mistral": COMMON | {"sliding_window": 99, "head_dim": 32},
    "qwen2": COMMON | {"use_sliding_window": True, "tie_word_embeddings": True},
    "phi3": COMMON | {"sliding_window": 99, "original_max_position_embeddings": 400, "partial_rotary_factor": 0.5},
}
TOWER: dict[str, Any] = {"layer_norm_eps": 3e-3, "hidden_act": "gelu", "num_attention_heads": 2}
# What a runtime of the target computes otherwise, so that it is refused.
REFUSED = {"gguf": {"hidden_act", "phi3.rope_scaling"}}
TARGETS = ("official", "xtuner", "gguf")


def make(models: Models, folder: Path, family: str, **values: Any) -> Path:
    """A transformers LLaVA of a family whose text config has these values, with random weights in their shapes."""
    shutil.copytree(models["hf"], folder)
    (folder / "conversion.json").unlink()
    path = folder / "config.json"
    content = json.loads(path.read_text())
    text = {k: v for k, v in content["text_config"].items() if k not in ("rope_scaling", "architectures")}
    text |= {"model_type": family, "sliding_window": None} | values
    if text.get("use_sliding_window"):
        text |= {"sliding_window": 99, "max_window_layers": 1}
    if family == "phi3":
        text.setdefault("partial_rotary_factor", 1.0)
    content["text_config"] = text
    content["tie_word_embeddings"] = bool(text.get("tie_word_embeddings"))
    path.write_text(json.dumps(content))
    table = architecture_for(LLM, family)
    made = np.random.default_rng(3)
    kept = {n: a for n, a in load_file(folder / "model.safetensors").items() if not n.startswith("language_model.")}
    weights = {
        name: (made.standard_normal(want.shape) / 8).astype(np.float16)
        for name, want in table.tensors(table.complete(text)).items()
        if want.tied is None
    }
    save_file(kept | weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def text_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
    return found


CASES = [(family, key, value) for family, keys in KEYS.items() for key, value in keys.items()]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(("family", "key", "value"), CASES, ids=[f"{family}.{key}" for family, key, _ in CASES])
def test_one_key_at_a_time(models: Models, tmp_path: Path, family: str, key: str, value: Any, to: str) -> None:
    source = make(models, tmp_path / "source", family, **{key: value})
    if {key, f"{family}.{key}"} & REFUSED.get(to, set()):
        with pytest.raises(UnsupportedError) as refused:
            llava_convert.convert(source, to=to, out=tmp_path / "out")
        assert str(value) in str(refused.value) or key in str(refused.value) or "linear" in str(refused.value)
        return
    llava_convert.convert(source, to=to, out=tmp_path / "out")
    assert llava_convert.verify(source, tmp_path / "out")
    llava_convert.convert(tmp_path / "out", to="hf", out=tmp_path / "back")
    back = text_of(tmp_path / "back")
    if key == "rope_scaling":
        assert {k: back[key].get(k) for k in ("type", "factor")} == {k: value[k] for k in ("type", "factor")}
    else:
        assert back[key] == value
    if key == "use_sliding_window":
        assert (back["sliding_window"], back["max_window_layers"]) == (99, 1)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("family", KEYS)
def test_all_that_the_pair_can_state_together(models: Models, tmp_path: Path, family: str, to: str) -> None:
    refused = REFUSED.get(to, set())
    values = {k: v for k, v in KEYS[family].items() if not {k, f"{family}.{k}"} & refused}
    source = make(models, tmp_path / "source", family, **values)
    edit(source, vision_feature_layer=-1, **{f"vision_config__{k}": v for k, v in TOWER.items()})
    edit(source, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    edit(source, tokenizer_model_max_length=321, tokenizer_padding_side="right")
    llava_convert.convert(source, to=to, out=tmp_path / "out")
    assert llava_convert.verify(source, tmp_path / "out")
    llava_convert.convert(tmp_path / "out", to="hf", out=tmp_path / "back")
    verdict = llava_convert.verify(source, tmp_path / "back")
    assert verdict.facts == {}
    # A GGUF never has the tower's last norm, which LLaVA does not read.
    assert all(to == "gguf" and "post_layernorm" in name for name in verdict.different)
    assert not (verdict.missing or verdict.extra or verdict.defects)
