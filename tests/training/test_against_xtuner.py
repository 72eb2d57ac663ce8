"""The trainer takes up what the real xtuner 0.1.23 left after two iterations, and must get where that one got."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_convert.core.resources import training
from llava_convert.storage.torch.file import read_torch, state_dict
from tests.training.programs import ROUNDING_ALONE

checkpoint, recipes = training("checkpoint"), training("recipe")
# What the real runs logged for their iterations 3 and 4 (message_hub of iter_4.pth).
LOSSES = {"c_pretrain": (6.28477001, 6.28004551), "d_full_fullvit": (6.23169708, 6.18573284)}


def recipe(golden: Path, case: str, **train: Any) -> Any:
    """The settings of the golden runs' config.py."""
    whole = case == "d_full_fullvit"
    settings = {
        "batch_size": 2, "lr": 1e-3, "warmup_ratio": 0.25, "warmup_start": 0.5, "save_steps": 2, "dtype": "fp32",
        "keep": -1, "mmengine_warmup": True,
    }  # fmt: skip
    return recipes.Recipe(
        case,
        recipes.ModelRecipe(
            str(golden / "parts/plain/llm"),
            str(golden / "parts/plain/vit"),
            freeze_llm=not whole,
            freeze_visual_encoder=not whole,
        ),
        recipes.DataRecipe((recipes.DataSet("all", "train.json"),), root=str(golden / "parts/plain/data"), workers=0),
        recipes.TrainRecipe(**{**settings, **train}),
    )


@pytest.mark.parametrize("case", list(LOSSES))
def test_going_on_from_the_real_xtuner(golden: Path, tmp_path: Path, case: str) -> None:
    """Weights, AdamW's state, the schedule, the order of the data: losses to 1e-5, weights to 1e-6 (measured: 0.0)."""
    shutil.copy(golden / "cases" / case / "pth" / "iter_2.pth", tmp_path)
    last = training("train").train(recipe(golden, case), tmp_path, resume=True)
    assert last == tmp_path / "iter_4.pth"
    ours = checkpoint.read_checkpoint(last)
    theirs = checkpoint.read_checkpoint(golden / "cases" / case / "pth" / "iter_4.pth")
    assert list(ours.state) == list(theirs.state) and ours.iteration == 4
    before = checkpoint.read_checkpoint(tmp_path / "iter_2.pth").state
    for name, tensor in theirs.state.items():
        atol = 1e-3 if name.endswith(ROUNDING_ALONE) else 1e-6
        assert torch.allclose(ours.state[name], tensor, rtol=0, atol=atol), name
    moved = max(float((theirs.state[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-4  # so the comparison above says something
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    for i, state in theirs.optimizer.items():
        assert torch.allclose(ours.optimizer[i]["exp_avg"], state["exp_avg"], rtol=0, atol=1e-6)
    found = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert found == pytest.approx(LOSSES[case], abs=1e-5)


def test_the_structure_of_a_checkpoint(golden: Path, tmp_path: Path) -> None:
    """The same entries, in the same order, pickled from the same globals as the real one's."""
    training("train").train(recipe(golden, "c_pretrain"), tmp_path)
    ours, theirs = (read_torch(p) for p in (tmp_path / "iter_2.pth", golden / "cases/c_pretrain/pth/iter_2.pth"))
    assert list(ours.root) == list(theirs.root)
    assert list(ours.root["meta"]) == list(theirs.root["meta"])
    assert set(ours.stubs) <= {name.replace("numpy.core", "numpy._core") for name in theirs.stubs} | set(theirs.stubs)
    for mine, other in zip(ours.root["param_schedulers"], theirs.root["param_schedulers"], strict=True):
        assert mine.keys() == other.keys()
        assert {k: v for k, v in mine.items() if k != "_last_value"} == {
            k: v for k, v in other.items() if k != "_last_value"
        }
        assert mine["_last_value"] == pytest.approx(other["_last_value"])
    assert list(state_dict(ours).tensors) == list(state_dict(theirs).tensors)
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_4.pth")


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8, "dropout": 0.1}])
def test_kill_and_resume(golden: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    """A run that was taken up again ends with the same bits, dropout included."""
    chosen = recipe(golden, "d_full_fullvit", epochs=2)
    if lora is not None:
        model = replace(chosen.model, freeze_visual_encoder=True, visual_encoder_lora=recipes.Lora(**lora))
        chosen = replace(chosen, model=model)
    train = training("train").train
    whole = checkpoint.read_checkpoint(train(chosen, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for late in ("iter_4.pth", "iter_6.pth", "iter_8.pth"):
        (tmp_path / "cut" / late).unlink()
    (tmp_path / "cut" / "last_checkpoint").write_text(str(tmp_path / "cut" / "iter_2.pth"))
    again = checkpoint.read_checkpoint(train(chosen, tmp_path / "cut", resume=True))
    assert again.iteration == whole.iteration == 8
    for name, tensor in whole.state.items():
        assert torch.equal(again.state[name], tensor), name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    assert len(logs[0]) == len(logs[1]) == 8


def test_accumulated_batches_are_one_large_one(golden: Path, tmp_path: Path) -> None:
    """Every answer of the golden data has its own length, so means differ; the step's direction does not."""
    chosen = recipe(golden, "c_pretrain", batch_size=1, accumulate=2, save_steps=8)
    last = checkpoint.read_checkpoint(training("train").train(chosen, tmp_path))
    assert last.iteration == 8
    assert all(float(state["step"]) == 4 for state in last.optimizer.values())
