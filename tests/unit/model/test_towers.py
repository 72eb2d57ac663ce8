"""Published towers: known by their shapes, so that nothing need be fetched for them."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.core.errors import InputError
from llava_convert.core.tensors import Extent, StoredTensor
from llava_convert.model import towers
from llava_convert.model.checkpoint import VISION
from llava_convert.model.configs import named_config
from llava_convert.model.tables.families import architectures
from llava_convert.model.towers import fits, id_by_shape, tower_config

CLIP = "openai/clip-vit-large-patch14-336"


def headers(config: dict[str, Any]) -> dict[str, StoredTensor]:
    """A tower of this config by its headers alone, in float16."""
    expected = architectures()[config["model_type"].split("_")[0]].tensors(config)
    return {
        name: StoredTensor(name, "F16", want.shape, (Extent(Path("x"), 0, 2 * prod(want.shape)),))
        for name, want in expected.items()
    }


def test_clip_l_336_is_what_openai_published() -> None:
    config = towers.towers()[CLIP]
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (1024, 4096, 24)
    assert (config["image_size"], config["patch_size"], config["num_attention_heads"]) == (336, 14, 16)
    assert (config["hidden_act"], config["projection_dim"], config["layer_norm_eps"]) == ("quick_gelu", 768, 1e-5)
    held = headers(config)
    assert len(held) == 391
    assert sum(tensor.numel for tensor in held.values()) == 303_507_456
    assert held["vision_tower.vision_model.embeddings.position_embedding.weight"].shape == (577, 1024)


@pytest.mark.parametrize("name", sorted(towers.towers()))
def test_each_is_known_by_its_shapes(name: str) -> None:
    config = towers.towers()[name]
    assert config["model_type"] in ("clip_vision_model", "siglip_vision_model")
    assert id_by_shape(config) == name
    found = tower_config(headers(config), None)
    assert found is not None and found["_name_or_path"] == name
    assert {k: v for k, v in found.items() if k != "_name_or_path"} == config


def test_one_other_dimension_is_another_tower() -> None:
    config = towers.towers()[CLIP]
    assert id_by_shape({**config, "image_size": 224}) != CLIP
    assert id_by_shape({**config, "layer_norm_eps": 1e-6}) is None
    assert id_by_shape({}) is None
    held = headers(config)
    del held["vision_tower.vision_model.post_layernorm.bias"]
    assert tower_config(held, None) is None


def test_a_recorded_config_wins_where_it_fits() -> None:
    config = towers.towers()[CLIP]
    recorded = {**config, "hidden_act": "gelu"}
    assert tower_config(headers(config), recorded) == recorded
    other = {**config, "image_size": 224}
    found = tower_config(headers(config), other)
    assert found is not None and found["_name_or_path"] == CLIP
    assert fits(config, headers(config)) and not fits(other, headers(config))


@pytest.fixture
def official(tmp_path: Path, tiny: Path) -> Path:
    """An official LLaVA as others publish it: a whole tower, no record, and a base that is not here."""
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "official")
    (tmp_path / "official" / "conversion.json").unlink()
    return tmp_path / "official"


def test_an_unknown_tower_needs_its_base(official: Path, tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(InputError) as caught:
        llava_convert.convert(official, to="hf", out=tmp_path / "hf")
    assert caught.value.exit_code == 3 and "visual_encoder=PATH" in str(caught.value.hint)
    llava_convert.convert(official, to="hf", out=tmp_path / "hf", visual_encoder=str(tiny / "vit"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]["image_size"] == 56


def test_a_known_tower_needs_none(official: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((tiny / "vit" / "config.json").read_text())
    sizes = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "transformers_version")}
    known = {"org/tiny-clip": named_config(sizes, VISION, where="test")}
    monkeypatch.setattr(towers, "towers", lambda: known)
    llava_convert.convert(official, to="hf", out=tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]
    assert found["_name_or_path"] == "org/tiny-clip"
    assert {k: found[k] for k in sizes} == sizes


def test_an_earlier_conversion_left_the_config(tmp_path: Path, tiny: Path) -> None:
    """conversion.json beside an official output holds what its config has no place for."""
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "a" / "official")
    shutil.move(tmp_path / "a" / "official", tmp_path / "elsewhere")
    llava_convert.convert(tmp_path / "elsewhere", to="hf", out=tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]
    assert (found["image_size"], found["num_hidden_layers"], found["hidden_act"]) == (56, 3, "quick_gelu")
