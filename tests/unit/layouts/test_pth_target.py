"""A `.pth` as a target: the names of a real one, a config that says what the source does, and what it cannot say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_convert
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.layouts.registry import recognise
from llava_convert.layouts.training_config import parse_training_config
from llava_convert.model.training import TrainingConfig
from tests.interop.by_hand import read_pth


def loaded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "model.pth", weights_only=True)
    return found


def config(folder: Path) -> TrainingConfig:
    return parse_training_config(loaded(folder)["meta"]["cfg"], "meta.cfg")


@pytest.fixture(scope="module")
def real(tiny: Path) -> dict[str, torch.Tensor]:
    """What the real xtuner left."""
    return read_pth(tiny / "iter_2.pth")


@pytest.mark.parametrize("way", ["pth", "xtuner"])
def test_the_names_and_bytes_of_the_real_one(
    tiny: Path, tmp_path: Path, real: dict[str, torch.Tensor], way: str
) -> None:
    source = tiny / "iter_2.pth"
    if way == "xtuner":
        source = tmp_path / "xtuner"
        llava_convert.convert(tiny / "iter_2.pth", to="xtuner", dtype="float32", out=source)
    llava_convert.convert(source, to="pth", dtype="float32", out=tmp_path / "pth", visual_encoder=tiny / "vit")
    state = loaded(tmp_path / "pth")["state_dict"]
    assert state.keys() == real.keys()
    assert all(torch.equal(state[name], value) for name, value in real.items())


def test_its_config_says_what_the_training_did(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(
        tiny / "iter_2.pth",
        to="pth",
        dtype="bfloat16",
        out=tmp_path / "pth",
        llm_id="org/llm",
        visual_encoder_id="org/vit",
    )
    mine, theirs = config(tmp_path / "pth"), recognise(tiny / "iter_2.pth").open().training
    assert theirs is not None
    assert (mine.llm, mine.visual_encoder, mine.llm_dtype) == ("org/llm", "org/vit", "bfloat16")
    assert str(tiny) not in loaded(tmp_path / "pth")["meta"]["cfg"], "no path of this machine"
    for setting in (
        "freeze_llm", "freeze_visual_encoder", "visual_select_layer", "projector_depth", "prompt_template", "llm_lora",
        "pad_image_to_square", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(mine, setting) == getattr(theirs, setting), setting
    lora, wanted = mine.visual_encoder_lora, theirs.visual_encoder_lora
    assert lora is not None and wanted is not None
    assert (lora.r, lora.lora_alpha, lora.bias, lora.use_rslora) == (wanted.r, wanted.lora_alpha, "none", False)
    assert lora.other["lora_dropout"] == wanted.other["lora_dropout"]


def test_the_folder_is_followed_to_its_file(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="pth", part="projector", out=tmp_path / "pth")
    found = recognise(tmp_path / "pth")
    assert (found.layout, found.found.path.name) == ("pth", "model.pth")
    assert set(found.open().tensors()) == {f"projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert config(tmp_path / "pth").freeze_llm and config(tmp_path / "pth").visual_encoder_lora is None


def test_it_is_already_one(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is already pth layout") as refused:
        llava_convert.convert(tiny / "iter_2.pth", to="pth", out=tmp_path / "pth")
    assert refused.value.hint == "give prompt_template, dtype or part to change it within its layout"
    with pytest.raises(UsageError, match="max_shard_size does not apply to pth"):
        llava_convert.convert(tiny / "iter_2.pth", to="pth", max_shard_size="1GB", out=tmp_path / "pth")


def test_the_same_bytes_each_time(tiny: Path, tmp_path: Path) -> None:
    files = []
    for threads in (1, 4):
        out = tmp_path / str(threads)
        llava_convert.convert(tiny / "iter_2.pth", to="pth", dtype="float16", out=out, name="m", threads=threads)
        files.append((out / "model.pth").read_bytes())
    assert files[0] == files[1]


def test_full_verification_reads_it_back(tiny: Path, tmp_path: Path) -> None:
    report = llava_convert.convert(
        tiny / "iter_2.pth", to="pth", dtype="float16", out=tmp_path / "pth", verify="full", digest=True
    )
    assert report.verified == "full" and llava_convert.verify(tiny / "iter_2.pth", tmp_path / "pth")
    record = json.loads((tmp_path / "pth" / "conversion.json").read_text())
    assert all(len(entry["xxh3_128"]) == 32 for entry in record["tensors"].values())


def test_what_a_training_config_cannot_say(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf")
    folder = shutil.copytree(tmp_path / "hf", tmp_path / "relu")
    content = json.loads((folder / "config.json").read_text()) | {"projector_hidden_act": "relu"}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="which the pth layout cannot hold") as refused:
        llava_convert.convert(folder, to="pth", out=tmp_path / "pth")
    assert "hf" in str(refused.value.hint)
