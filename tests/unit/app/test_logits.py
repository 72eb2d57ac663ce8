"""`verify --logits` finds each planted fault and says where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.app.logits.compare import BOUNDS
from llava_convert.app.logits.probes import PROBES, drawn
from llava_convert.cli import app
from llava_convert.core.errors import UsageError

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, dtype="float32")
    return out


def layer(number: int) -> str:
    return f"language_model.model.layers.{number}."


def unpermuted(tensors: Tensors, _: Path) -> None:
    """The rows of GGUF's rope, taken for transformers': four heads of sixteen."""
    name = f"{layer(1)}self_attn.q_proj.weight"
    weight = tensors[name]
    tensors[name] = weight.view(4, 2, 8, -1).transpose(1, 2).reshape(weight.shape)


def swapped(tensors: Tensors, _: Path) -> None:
    for name in [name for name in tensors if name.startswith(layer(0))]:
        other = name.replace(layer(0), layer(1))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def without_lora(tensors: Tensors, tiny: Path) -> None:
    base = load_file(tiny / "vit" / "model.safetensors")
    tensors |= {n: base[n.removeprefix("vision_tower.")].float() for n in tensors if n.startswith("vision_tower.")}


def without_class_token(tensors: Tensors, _: Path) -> None:
    tensors["vision_tower.vision_model.embeddings.class_embedding"].zero_()


FAULTS: dict[str, tuple[Callable[[Tensors, Path], None] | None, str, dict[str, Any], str]] = {
    "unpermuted q_proj": (unpermuted, "", {}, "language_model.layers.1"),
    "swapped layers": (swapped, "", {}, "language_model.layers.0"),
    "tower without its LoRA": (without_lora, "", {}, "vision_tower.layers.0"),
    "no class token": (without_class_token, "", {}, "vision_tower.embeddings"),
    "rope base": (None, "config.json", {"text_config": {"rope_theta": 10000.0}}, "language_model.layers.0"),
    "feature layer": (None, "config.json", {"vision_feature_layer": -1}, "features"),
    "mean": (None, "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "pixels"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_placed(tiny: Path, good: Path, tmp_path: Path, fault: str) -> None:
    change, file, keys, place = FAULTS[fault]
    out = tmp_path / "o"
    shutil.copytree(good, out)
    if change is not None:
        tensors = load_file(out / "model.safetensors")
        change(tensors, tiny)
        save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    if file:
        config = json.loads((out / file).read_text())
        for key, value in keys.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (out / file).write_text(json.dumps(config))
    verdict = llava_convert.verify(tiny / "iter_2.pth", out, logits=True, device="cpu")
    found = verdict.logits
    assert found is not None and found.parts is not None
    assert (verdict.same, found.same, found.parts.name) == (False, False, place)
    before = found.sites[: found.sites.index(found.parts)]
    assert all(site.largest == 0 for site in before if site.name.split(".")[0] == place.split(".")[0])
    assert f"the models part at {place}" in found.sentence()


@pytest.mark.slow
def test_models_that_are_the_same(tiny: Path, good: Path, tmp_path: Path) -> None:
    """In float32 to the bit; in float16 and bfloat16 by what the dtype explains, and by no tenth of it less."""
    exact = llava_convert.verify(tiny / "iter_2.pth", good, logits=True, device="cpu").logits
    assert exact is not None and exact.same and all(site.largest == 0 for site in exact.sites)
    assert [one.parts_at for one in exact.said] == [None] * len(PROBES)
    assert [site.name for site in exact.sites] == [
        "prompt", "pixels", "vision_tower.embeddings", "vision_tower.layers.0", "vision_tower.layers.1", "features",
        "projector", "language_model.embeddings", "language_model.layers.0", "language_model.layers.1", "logits",
    ]  # fmt: skip
    for dtype in ("float16", "bfloat16"):
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / dtype, dtype=dtype)
        found = llava_convert.verify(tiny / "iter_2.pth", tmp_path / dtype, logits=True, device="cpu").logits
        assert found is not None and found.same and (found.dtype, found.bound) == (dtype, BOUNDS[dtype])
        assert BOUNDS[dtype] / 20 < max(site.relative for site in found.sites) < BOUNDS[dtype]


@pytest.mark.slow
def test_the_command(tiny: Path, good: Path) -> None:
    words = ["verify", str(tiny / "iter_2.pth"), str(good), "--logits", "--layers", "--device", "cpu"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "language_model.layers.1" in found.stdout and "4 of 4 answers equal" in found.stdout


def test_what_makes_no_sense_is_refused(tiny: Path) -> None:
    for options in ({"layers": True}, {"device": "cpu"}, {"logits": True, "part": "llm"}):
        with pytest.raises(UsageError, match="does not apply"):
            llava_convert.verify(tiny / "iter_2.pth", tiny, **options)


def test_the_pictures_see_a_crop() -> None:
    """The four discs lie in the corners, beyond what a crop of the middle keeps of the wide and the tall one."""
    for probe in PROBES[1:]:
        assert probe.size is not None
        width, height = probe.size
        picture = drawn(width, height)
        assert picture.size == probe.size and picture.getpixel((round(0.15 * width), round(0.2 * height))) == (
            250,
            30,
            30,
        )
