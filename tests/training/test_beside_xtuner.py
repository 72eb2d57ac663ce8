"""Our trainer and the real xtuner 0.1.23, side by side: each takes up what the other leaves, and both compute the same.

Losses to 1e-6 relative and weights to 2e-6, after steps of 1e-3 a weight: measured were 2e-7 and 5e-7 with accumulated
gradients, else equal weights. Sums are in another order here and there, in transformers 5 and in 4.43.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llava_convert
from llava_convert.core.resources import training
from tests.training.drawn import KINDS, draw, recipe
from tests.training.programs import convert, furthest, losses, xtuner

pytestmark = pytest.mark.peers
checkpoint = training("checkpoint")


def run(chosen: Any, work_dir: Path, **options: Any) -> Path:
    last: Path = training("train").train(chosen, work_dir, **options)
    return last


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_real_one_converts_and_resumes(tiny: Path, tmp_path: Path, kind: str) -> None:
    """With the config that lies beside the checkpoint, as it is; our own converter makes the same of both files."""
    work, other = tmp_path / "work", tmp_path / "other"
    chosen = recipe(tiny, draw(tmp_path / "data"), kind)
    last = run(chosen, work)
    config = work / f"{kind}.py"
    jobs: list[dict[str, Any]] = [convert(config, last, tmp_path / form, form) for form in ("xtuner", "official")]
    jobs.append({"train": str(config), "work_dir": str(other), "resume": str(work / "iter_2.pth")})
    resumed = xtuner(tmp_path / "jobs", *jobs)[-1]
    assert resumed["losses"] == pytest.approx(losses(work), rel=1e-6)
    assert furthest(last, other / "iter_4.pth") < 2e-6
    assert furthest(last, work / "iter_2.pth") > 1e-4  # so the comparison above says something
    ours = tmp_path / "ours"
    llava_convert.convert(last, to="official", out=ours)
    theirs = load_file(tmp_path / "official" / "model.safetensors")
    mine = {name: tensor for file in ours.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in mine.items())


@pytest.mark.parametrize("kind", ["full_vitlora", "llmlora_vitlora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_from_equal_weights(tiny: Path, tmp_path: Path, kind: str, accumulate: int) -> None:
    """Both start at iteration 0 from one checkpoint's weights, adapters included, with a new optimiser.

    With accumulation a step is of two micro-batches: the mean of their losses, one clipped gradient.
    """
    data = draw(tmp_path / "data")
    start = run(recipe(tiny, data, kind, seed=5, max_iters=2), tmp_path / "start")
    rows = {"batch_size": 2 // accumulate, "accumulate": accumulate, "save_steps": 4 * accumulate}
    chosen = recipe(tiny, data, kind, model={"pretrained": str(start)}, seed=7, **rows)
    last = run(chosen, tmp_path / "work")
    job = {"train": str(tmp_path / "work" / f"{kind}.py"), "work_dir": str(tmp_path / "other")}
    (theirs,) = xtuner(tmp_path / "jobs", job)
    assert len(theirs["losses"]) == 4 * accumulate
    assert theirs["losses"] == pytest.approx(losses(tmp_path / "work"), rel=1e-6)
    assert furthest(last, tmp_path / "other" / last.name) < 2e-6
    assert furthest(last, start) > 1e-3


STAGES = {
    "pretrain": {"sampler": "shuffle", "pad_image_to_square": False},
    "full_vitlora": {"sampler": "length_grouped", "pad_image_to_square": True},
}


@pytest.mark.parametrize("kind", list(STAGES))
def test_a_stage_as_the_recipes_have_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """From equal weights, two epochs of 27 rows in batches of two: the same samples in the same order, and losses.

    A first stage takes pictures resized and cropped in a plain shuffle, whose last batch is a half one; a second stage
    takes them padded, grouped by length.
    """
    data = draw(tmp_path / "data", 22)
    rows = json.loads((data / "train.json").read_text())
    for number in range(5):
        said = [{"from": "human", "value": "Two words. " * (number + 1)}, {"from": "gpt", "value": "red boat"}]
        rows.append({"id": str(22 + number), "conversations": said})
    (data / "train.json").write_text(json.dumps(rows))
    start = run(recipe(tiny, data, kind, seed=5, max_iters=2), tmp_path / "start")
    chosen = recipe(tiny, data, kind, model={"pretrained": str(start)}, seed=7, epochs=2.0, save_steps=28)
    chosen = replace(chosen, data=replace(chosen.data, **STAGES[kind]))
    taken: list[str] = []
    dataset = training("data").Conversations
    getitem = dataset.__getitem__

    def noted(self: Any, at: int) -> Any:
        encoded, i, _ = self.index[at]
        taken.append(str(encoded.rows[i] - 1))
        return getitem(self, at)

    monkeypatch.setattr(dataset, "__getitem__", noted)
    run(chosen, tmp_path / "work")
    job = {"train": str(tmp_path / "work" / f"{kind}.py"), "work_dir": str(tmp_path / "other")}
    (theirs,) = xtuner(tmp_path / "jobs", job)
    assert len(taken) == (54 if kind == "pretrain" else 56)
    assert theirs["samples"] == ["0", "0", *taken]  # its DatasetInfoHook shows the first one before it trains
    assert len(theirs["losses"]) == 28
    assert theirs["losses"] == pytest.approx(losses(tmp_path / "work"), rel=1e-6)


def test_what_does_not_fill_a_step(tiny: Path, tmp_path: Path) -> None:
    """Nine iterations, four accumulated: the last step is of one, whose gradient is not divided by four."""
    data = draw(tmp_path / "data", 9)
    start = run(recipe(tiny, data, "pretrain", seed=5, max_iters=2), tmp_path / "start")
    rows = {"batch_size": 1, "accumulate": 4, "save_steps": 99}
    chosen = recipe(tiny, data, "pretrain", model={"pretrained": str(start)}, seed=7, max_norm=1e9, **rows)
    chosen = replace(chosen, data=replace(chosen.data, **STAGES["pretrain"]))
    last = run(chosen, tmp_path / "work")
    job = {"train": str(tmp_path / "work" / "pretrain.py"), "work_dir": str(tmp_path / "other")}
    (theirs,) = xtuner(tmp_path / "jobs", job)
    assert last.name == "iter_9.pth" and theirs["losses"] == pytest.approx(losses(tmp_path / "work"), rel=1e-6)
    assert furthest(last, tmp_path / "other" / "iter_9.pth") < 2e-6
    ours, other = (checkpoint.read_checkpoint(path).optimizer for path in (last, tmp_path / "other" / "iter_9.pth"))
    assert ours.keys() == other.keys()
    for number, moments in ours.items():  # which a gradient of another length would change
        apart = moments["exp_avg"] - other[number]["exp_avg"]
        assert float(apart.norm()) < 1e-4 * float(other[number]["exp_avg"].norm())


@pytest.mark.parametrize("kind", ["full_vitlora", "llmlora_vitlora"])
def test_bfloat16(tiny: Path, tmp_path: Path, kind: str) -> None:
    """The LLM built in bfloat16, computed under an autocast: dtypes are equal, losses to what bfloat16 tells apart."""
    data = draw(tmp_path / "data")
    chosen = recipe(tiny, data, kind, model={"llm_dtype": "bf16"}, dtype="bf16")
    last = run(chosen, tmp_path / "work")
    job = {"train": str(tmp_path / "work" / f"{kind}.py"), "work_dir": str(tmp_path / "other"), "bf16": True}
    (theirs,) = xtuner(tmp_path / "jobs", {**job, "resume": str(tmp_path / "work" / "iter_2.pth")})
    assert theirs["losses"] == pytest.approx(losses(tmp_path / "work"), rel=3e-3)
    assert furthest(last, tmp_path / "other" / last.name) < 1e-3  # which compares names and dtypes too
    kinds = {name.partition(".")[0]: t.dtype for name, t in checkpoint.read_checkpoint(last).state.items()}
    assert kinds["llm"] == (torch.bfloat16 if kind == "full_vitlora" else torch.float32)
    assert kinds["visual_encoder"] == kinds["projector"] == torch.float32


def test_rows_without_a_picture_and_several_turns(tiny: Path, tmp_path: Path) -> None:
    """Two epochs, whose order groups pictures and texts; batches of texts alone among them."""
    data = draw(tmp_path / "data", 12)
    rows = json.loads((data / "train.json").read_text())
    more = [{"from": "human", "value": "And what else?"}, {"from": "gpt", "value": "nothing else"}]
    rows[3]["conversations"] += more
    for number in range(6):
        asked = {"from": "human", "value": "Reporter two words. " * (number + 1)}
        rows.append({"id": f"t{number}", "conversations": [asked, {"from": "gpt", "value": "red boat"}, *more]})
    (data / "train.json").write_text(json.dumps(rows))
    work = tmp_path / "work"
    last = run(recipe(tiny, data, "full_vitlora", epochs=2.0), work)
    job = {"train": str(work / "full_vitlora.py"), "work_dir": str(tmp_path / "other")}
    (theirs,) = xtuner(tmp_path / "jobs", {**job, "resume": str(work / "iter_2.pth")})
    assert len(theirs["losses"]) == 18
    assert theirs["losses"] == pytest.approx(losses(work), rel=1e-6)
    assert furthest(last, tmp_path / "other" / last.name) < 2e-6
