"""The real DeepSpeed 0.14.4 on two CPU processes: its folders convert, here and by the real xtuner, and are taken up.

DeepSpeed's sums are in another order than those of plain data parallelism: losses to 2e-6 relative, weights to 1e-5.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llava_convert
from llava_convert.core.errors import UsageError
from llava_convert.core.resources import training
from tests.interop.peer_programs import PEERS
from tests.training.drawn import draw, recipe
from tests.training.programs import command, convert, losses, train, xtuner
from tests.training.test_processes import cut_back, limited

pytestmark = pytest.mark.peers
checkpoint, model = training("checkpoint"), training("model")
# Each process takes two micro-batches of one sample for a step.
HALVES = {"batch_size": 1, "accumulate": 2, "epochs": 2.0, "save_steps": 4}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on two processes without DeepSpeed."""
    work = tmp_path_factory.mktemp("plain") / "work"
    train(recipe(tiny, data, "full_vitlora", **HALVES), work, processes=2)
    return work


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an output, its parts' folders included."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.relative_to(folder)}/{name}": t for name, t in load_file(file).items()}
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_as_plain_data_parallelism(tiny: Path, tmp_path: Path, data: Path, plain: Path, stage: int) -> None:
    """And taken up again, the run ends with the same bits as one that was not stopped."""
    chosen = recipe(tiny, data, "full_vitlora", **HALVES)
    work, again = tmp_path / "work", tmp_path / "again"
    train(chosen, work, "--deepspeed", f"zero{stage}", processes=2, peer="deepspeed")
    assert losses(work) == pytest.approx(losses(plain), rel=2e-6)
    trained = model.read_trained(work / "iter_8.pth")
    assert apart(trained, checkpoint.read_checkpoint(plain / "iter_8.pth").state) < 1e-5
    assert apart(trained, model.read_trained(work / "iter_4.pth")) > 1e-4
    assert (work / "last_checkpoint").read_text() == str(work / "iter_8.pth")
    cut_back(work, again, 4)
    (again / ".iter_8.pth.partial").mkdir()  # as a run leaves it that is killed while it writes
    train(chosen, again, "--resume", "--deepspeed", f"zero{stage}", processes=2, peer="deepspeed")
    assert apart(trained, model.read_trained(again / "iter_8.pth")) == 0.0
    assert losses(again) == losses(work)
    assert [path.name for path in again.glob(".*")] == []
    done = train(chosen, again, "--resume", "--deepspeed", f"zero{stage}", processes=2, peer="deepspeed")
    assert "nothing is left to do" in done.stderr
    # The same folder under other circumstances: each is told, none trains.
    wrong = "zero2" if stage == 3 else "zero3"
    (again / "iter_8.pth").rename(tmp_path / "away")
    failed = train(chosen, again, "--resume", "--deepspeed", wrong, processes=2, peer="deepspeed", fails=True)
    assert f"is of ZeRO-{stage}" in failed.stderr and f"--deepspeed zero{stage}" in failed.stderr
    with pytest.raises(UsageError, match="is a DeepSpeed checkpoint"):
        training("train").train(chosen, again, resume=True)


@pytest.mark.parametrize(
    ("kind", "stage", "dtype"),
    [
        ("full_vitlora", 1, "fp32"), ("full_vitlora", 2, "bf16"), ("llmlora_vitlora", 2, "fp32"),
        ("pretrain", 3, "fp32"), ("full_fullvit", 3, "bf16"),
    ],
)  # fmt: skip
def test_the_real_xtuner_converts(tiny: Path, tmp_path: Path, data: Path, kind: str, stage: int, dtype: str) -> None:
    """With the config beside the folder. It reads the float32 masters as float16, so both are compared as that."""
    work = tmp_path / "work"
    chosen = recipe(tiny, data, kind, batch_size=1, dtype=dtype)
    train(chosen, work, "--deepspeed", f"zero{stage}", processes=2, peer="deepspeed")
    last = work / "iter_4.pth"
    jobs: list[dict[str, Any]] = [
        convert(work / f"{kind}.py", last, tmp_path / f"theirs_{form}", form) for form in ("xtuner", "official")
    ]
    xtuner(tmp_path / "jobs", *jobs)
    for form in ("xtuner", "official"):
        llava_convert.convert(last, to=form, out=tmp_path / form)
        ours, theirs = weights(tmp_path / form), weights(tmp_path / f"theirs_{form}")
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # A merge of a LoRA that was rounded before differs in a last place from one that is rounded after.
            assert torch.allclose(tensor.half().float(), theirs[name].half().float(), rtol=1e-3, atol=1e-6), name


def test_one_process(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Without torchrun, from a first stage's adapters; transformers builds a ZeRO-3 model in shares from the start."""
    first = training("train").train(recipe(tiny, data, "full_vitlora", seed=5, max_iters=2), tmp_path / "first")
    chosen = recipe(tiny, data, "full_vitlora", model={"pretrained": str(first)})
    plain = training("train").train(chosen, tmp_path / "plain")
    train(chosen, tmp_path / "zero", "--deepspeed", "zero3", peer="deepspeed")
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), rel=2e-6)
    trained = model.read_trained(tmp_path / "zero" / "iter_4.pth")
    # AdamW moves a weight by the sign of a gradient that is almost nothing, and DeepSpeed clips by a norm plus 1e-6.
    assert apart(trained, checkpoint.read_checkpoint(plain).state) < 3e-5


@pytest.mark.parametrize("word", ["deepspeed_zero2", "zero2_offload", "deepspeed_zero3_offload"])
def test_xtuners_words_and_those_that_keep_the_optimiser_on_the_cpu(
    tiny: Path, tmp_path: Path, data: Path, word: str
) -> None:
    """The optimiser is torch's own AdamW there too; DeepSpeed compiles nothing but its way between processes."""
    chosen = recipe(tiny, data, "full_vitlora", max_iters=2)
    training("train").train(chosen, tmp_path / "plain")
    train(chosen, tmp_path / "zero", "--deepspeed", word, peer="deepspeed")
    assert len(losses(tmp_path / "zero")) == 2
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), rel=2e-6)


def test_a_full_disk(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Exit 6; the folder before it, and what points at it, stay as they are."""
    chosen = recipe(tiny, data, "full_vitlora")
    work = tmp_path / "work"
    train(chosen, work, "--deepspeed", "zero2", peer="deepspeed")
    shutil.rmtree(work / "iter_4.pth")
    checkpoint.point_at(work / "iter_2.pth")
    words = command(chosen, work, "--resume", "--deepspeed", "zero2")
    done = limited(400_000, words, tmp_path, PEERS / "deepspeed" / "bin" / "python")
    assert done.returncode == 6, done.stderr
    assert "iter_4.pth cannot be written: the disk is full" in done.stderr
    assert [path.name for path in work.glob("*iter_*")] == ["iter_2.pth"]
    assert (work / "last_checkpoint").read_text() == str(work / "iter_2.pth")
    train(chosen, work, "--resume", "--deepspeed", "zero2", peer="deepspeed")
    assert (work / "last_checkpoint").read_text() == str(work / "iter_4.pth")
