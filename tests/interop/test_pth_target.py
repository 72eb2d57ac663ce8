"""Our `.pth` in the hands of those who read one: torch, the real xtuner, and the trainer of this package."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

import llava_convert
from llava_convert.core.resources import training
from tests.conftest import CHECKOUT
from tests.training.programs import convert, xtuner


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model as `.pth`: every part merged, as no training leaves it."""
    folder = tmp_path_factory.mktemp("whole")
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=folder / "official")
    llava_convert.convert(folder / "official", to="pth", out=folder / "pth")
    return folder


def config(file: Path, tiny: Path, **values: Any) -> Path:
    """A training config of xtuner's."""
    fields = {
        "llm": tiny / "llm", "visual_encoder": tiny / "vit", "data": file.parent, "pretrained_pth": None, "seed": 1,
        "freeze_llm": False, "freeze_visual_encoder": False, "more_model": "", "more_llm": "", "llm_lora": "",
        "visual_encoder_lora": "",
    }  # fmt: skip
    text = (CHECKOUT / "tests" / "peers" / "xtuner_config.txt").read_text()
    file.write_text(Template(text).substitute({**fields, **values}))
    return file


@pytest.mark.peers
def test_the_real_xtuner_starts_from_it_and_converts_it(tiny: Path, whole: Path, tmp_path: Path) -> None:
    file = whole / "pth" / "model.pth"
    chosen = config(tmp_path / "config.py", tiny, pretrained_pth=repr(str(file)))
    xtuner(tmp_path / "jobs", convert(chosen, file, tmp_path / "theirs", "xtuner"))
    assert llava_convert.verify(whole / "pth", tmp_path / "theirs", llm=tiny / "llm", visual_encoder=tiny / "vit")


@pytest.mark.peers
def test_the_real_xtuner_converts_a_checkpoint_with_an_adapter(tiny: Path, tmp_path: Path) -> None:
    """Ours of a real one, with the names of a model under training."""
    llava_convert.convert(tiny / "iter_2.pth", to="xtuner", dtype="float32", out=tmp_path / "xtuner")
    llava_convert.convert(tmp_path / "xtuner", to="pth", out=tmp_path / "pth", visual_encoder=tiny / "vit")
    lora = "dict(type=LoraConfig, r=8, lora_alpha=16, lora_dropout=0.05, bias='none')"
    chosen = config(
        tmp_path / "config.py",
        tiny,
        freeze_visual_encoder=True,
        visual_encoder_lora=f",\n    visual_encoder_lora={lora}",
    )
    xtuner(tmp_path / "jobs", convert(chosen, tmp_path / "pth" / "model.pth", tmp_path / "theirs", "xtuner"))
    assert llava_convert.verify(tiny / "iter_2.pth", tmp_path / "theirs", visual_encoder=tiny / "vit")


def test_torch_loads_the_weights_alone(whole: Path) -> None:
    found = torch.load(whole / "pth" / "model.pth", weights_only=True)
    assert list(found) == ["meta", "state_dict"] and "xtuner.model.LLaVAModel" in found["meta"]["cfg"]
    assert {name.split(".")[0] for name in found["state_dict"]} == {"llm", "visual_encoder", "projector"}


def test_our_trainer_reads_every_tensor(whole: Path) -> None:
    read = training("model").read_trained(whole / "pth")
    stored = torch.load(whole / "pth" / "model.pth", weights_only=True)["state_dict"]
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], value) for name, value in stored.items())
