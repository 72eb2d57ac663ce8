"""Towers in an mmproj beside the usual one: SigLIP, and CLIP of other sizes; in the real llama.cpp, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import llava_convert
from llava_convert.core.errors import UnsupportedError
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import Made, write
from tests.interop.llama_cpp import LlamaCpp, llm_file, metadata, mmproj_file, tensors
from tests.interop.test_llama_cpp import MARKER, answer, prompt, with_class_token_last

FULL = {"vision_feature_select_strategy": "full"}
TOWERS = {
    "siglip": Made(FULL, tower="siglip"),
    "siglip-cut": Made({**FULL, "vision_feature_layer": -1}, vision={"vision_use_head": False}, tower="siglip"),
    "siglip-larger": Made(FULL, vision={"hidden_size": 48, "patch_size": 16, "image_size": 64}, tower="siglip"),
    "clip-larger": Made(vision={"hidden_size": 48, "patch_size": 8, "image_size": 40, "num_hidden_layers": 5}),
    "clip-of-two-blocks": Made({"vision_feature_layer": -1}, vision={"num_hidden_layers": 2}),
}
# Measured: 4e-4 to 9e-4, of the projector's GELU, which ggml computes by tanh.
ROWS = 3e-3


def source_of(folder: Path, base: Path, name: str) -> Path:
    made = TOWERS[name]
    source = write(folder, base, made)
    side = made.vision.get("image_size", 56)
    file = source / "preprocessor_config.json"
    file.write_text(file.read_text().replace("56", str(side)))
    return source


@pytest.mark.parametrize("name", TOWERS)
def test_to_gguf_and_back(converted: Converter, tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path / "source", converted("tiny", "hf"), name)
    llava_convert.convert(source, to="gguf", out=tmp_path / "gguf", outtype="f32", mmproj_outtype="f32", verify="full")
    said, there = (read(mmproj_file(tmp_path / "gguf", "f32")) for read in (metadata, tensors))
    assert said["clip.use_gelu"][1] is ("siglip" in name) and said["clip.projector_type"][1] == "mlp"
    assert ("v.class_embd" in there, "v.patch_embd.bias" in there) == ("siglip" not in name, "siglip" in name)
    llava_convert.convert(tmp_path / "gguf", to="hf", out=tmp_path / "hf", dtype="float32")
    first, last = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    unread = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.head")
    for key, value in first.items():
        if not key.startswith(unread):
            assert torch.equal(value, last[key][: len(value)]), key
    assert not last.keys() - first.keys()
    assert llava_convert.verify(source, tmp_path / "gguf")


@pytest.mark.peers
@pytest.mark.parametrize("name", TOWERS)
def test_in_llama_cpp(converted: Converter, llama_cpp: LlamaCpp, tiny: Path, tmp_path: Path, name: str) -> None:
    """The rows that stand for a picture, and what is said of it; stock, and repaired where that differs."""
    source = source_of(tmp_path / "source", converted("tiny", "hf"), name)
    side = TOWERS[name].vision.get("image_size", 56)
    picture = tmp_path / "picture.png"
    Image.open(tiny / "picture.png").convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(picture)
    np.save(tmp_path / "picture.npy", np.asarray(Image.open(picture)))
    ours = converted.onward(source, "gguf", outtype="f32", mmproj_outtype="f32")
    task = {
        "kind": "picture", "model": llm_file(ours, "f32"), "mmproj": mmproj_file(ours, "f32"),
        "picture": tmp_path / "picture.npy", "prompt": prompt(MARKER), "count": 12,
    }  # fmt: skip
    for runtime in ("stock", "repaired"):
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
        if runtime == "stock" and "siglip" not in name:
            model = with_class_token_last(model)
        rows, ids = answer(model, source, picture, 12)
        found = llama_cpp.ask(runtime, seen=task)["seen"]
        assert gap(torch.from_numpy(found["array"]), rows) <= ROWS, runtime
        assert found["ids"] == ids, runtime


def test_a_siglip_that_xtuner_trained(converted: Converter, tmp_path: Path) -> None:
    """Its first patch was left out in training, and llama.cpp hands on every one."""
    source = write(tmp_path / "source", converted("tiny", "hf"), Made(tower="siglip"))
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy is default"):
        llava_convert.convert(source, to="gguf", out=tmp_path / "gguf")


@pytest.mark.parametrize("kind", ["dinov2", "pixtral", "intern_vit_6b", "eva_clip_model"])
def test_other_towers_are_refused_by_name(converted: Converter, tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "source", converted("tiny", "hf"), Made())
    file = source / "config.json"
    file.write_text(file.read_text().replace("clip_vision_model", kind))
    for to in ("official", "xtuner", "gguf"):
        with pytest.raises(UnsupportedError, match=f"'{kind}' is not a known vision tower family") as refused:
            llava_convert.convert(source, to=to, out=tmp_path / "out")
        assert "siglip_vision_model" in str(refused.value.hint)
