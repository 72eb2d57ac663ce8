"""`--mmproj-for stock`: in the stock runtime every patch but the first is what the model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llava_convert
from llava_convert.core.errors import UsageError
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import Made, write
from tests.interop.llama_cpp import LlamaCpp, llm_file, metadata, mmproj_file, tensors
from tests.interop.test_llama_cpp import MARKER, ROWS_F32, answer, picture, prompt, reference

__all__ = ["picture"]  # a fixture
POSITIONS = "v.position_embd.weight"


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_the_first_position_is_the_last(converted: Converter, tmp_path: Path, name: str) -> None:
    folder = converted(name, "hf", dtype="float32")
    usual = converted.onward(folder, "gguf", outtype="f32", mmproj_outtype="f32")
    out = tmp_path / "gguf"
    llava_convert.convert(folder, to="gguf", out=out, outtype="f32", mmproj_outtype="f32,f16", mmproj_for="stock")
    files = sorted(file.name.removeprefix("gguf") for file in out.glob("*mmproj*.gguf"))
    assert files == ["-mmproj-stock-f16.gguf", "-mmproj-stock-f32.gguf"]
    ours, theirs = (tensors(file) for file in (out / "gguf-mmproj-stock-f32.gguf", mmproj_file(usual, "f32")))
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key].data != theirs[key].data} == {POSITIONS}
    rows = [np.frombuffer(one[POSITIONS].data, np.float32).reshape(17, -1) for one in (ours, theirs)]
    assert np.array_equal(rows[0], np.roll(rows[1], -1, axis=0))
    assert metadata(out / "gguf-mmproj-stock-f32.gguf")["llava.mmproj_for"] == (("STRING",), "stock")
    assert "Only for today's llama.cpp" in (out / "README.md").read_text()
    assert json.loads((out / "conversion.json").read_text())["options"]["mmproj_for"] == "stock"


def test_it_is_told_and_taken_back(converted: Converter, tmp_path: Path) -> None:
    """By the file alone, without the record."""
    folder = converted("tiny", "hf", dtype="float32")
    out = tmp_path / "gguf"
    llava_convert.convert(
        folder, to="gguf", out=out, outtype="f32", mmproj_outtype="f32", mmproj_for="stock", verify="full"
    )
    (out / "conversion.json").unlink()
    assert llava_convert.verify(folder, out)
    assert "puts the class token last" in str(llava_convert.inspect(out).as_json())
    llava_convert.convert(out, to="hf", out=tmp_path / "back", dtype="float32")
    first, last = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "back"))
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"
    assert torch.equal(first[name], last[name])


def test_a_tower_without_a_class_token_needs_it_not(converted: Converter, tmp_path: Path) -> None:
    made = Made({"vision_feature_select_strategy": "full"}, tower="siglip")
    source = write(tmp_path / "source", converted("tiny", "hf"), made)
    with pytest.raises(UsageError, match="has no class token") as refused:
        llava_convert.convert(source, to="gguf", out=tmp_path / "gguf", mmproj_for="stock")
    assert refused.value.exit_code == 2


@pytest.mark.peers
@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_features_in_the_stock_runtime(
    converted: Converter, llama_cpp: LlamaCpp, picture: Path, tmp_path: Path, name: str
) -> None:
    """Rows 2 to 16 of the trained model stand where 1 to 15 should, and the class token's row is the last."""
    folder = converted(name, "hf", dtype="float32")
    out = tmp_path / "gguf"
    llava_convert.convert(folder, to="gguf", out=out, outtype="f32", mmproj_outtype="f32", mmproj_for="stock")
    usual = converted.onward(folder, "gguf", outtype="f32", mmproj_outtype="f32,f16")
    task = {
        "kind": "picture", "model": llm_file(usual, "f32"), "picture": picture.with_suffix(".npy"),
        "prompt": prompt(MARKER), "count": 1,
    }  # fmt: skip
    files = {"stock": out / "gguf-mmproj-stock-f32.gguf", "standard": mmproj_file(usual, "f32")}
    found = llama_cpp.ask("stock", **{key: {**task, "mmproj": file} for key, file in files.items()})
    wanted, _ = answer(reference(folder), folder, picture, 1)
    rows = {key: torch.from_numpy(one["array"]) for key, one in found.items()}
    assert gap(rows["stock"][:-1], wanted[1:]) <= ROWS_F32
    assert gap(rows["standard"][:-1], wanted[1:]) > 20 * ROWS_F32
