"""What HF's Trainer leaves under the real DeepSpeed 0.14.4 on two processes, and what zero_to_fp32 makes of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import llava_convert
from tests.conftest import CHECKOUT
from tests.interop.peer_programs import PEERS

pytestmark = pytest.mark.peers
PYTHON = PEERS / "deepspeed/bin/python"
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deepspeed") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", dtype="bfloat16", out=out)
    return out


@pytest.mark.parametrize(("stage", "ties"), [(1, "tied"), (2, "untied"), (3, "untied"), (3, "tied")])
def test_a_run_of_the_trainer(model: Path, tmp_path: Path, stage: int, ties: str) -> None:
    if not PYTHON.is_file():
        pytest.skip("no environment deepspeed: `make peers` builds it")
    script, run = CHECKOUT / "tests/peers/train_deepspeed.py", tmp_path / "run"
    command = list(map(str, (PYTHON, script, model, run, stage, ties, 2)))
    done = subprocess.run(command, env={**os.environ, **CPU}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    saved, merged = run / "checkpoint-2", run / "fp32"
    assert (saved / "latest").read_text() == "global_step2"
    # The weights that the Trainer itself saves, where it has them whole, are those of 16 bits.
    whole = saved / "model.safetensors"
    if whole.is_file():
        llava_convert.convert(saved, to="official", out=tmp_path / "whole", config_from=model)
        assert llava_convert.verify(saved, tmp_path / "whole", config_from=model)
        whole.unlink()
    # The masters of float32, of the run's folder and of the save alone, are those that DeepSpeed's own script makes.
    llava_convert.convert(merged, to="official", out=tmp_path / "merged", config_from=model)
    assert llava_convert.verify(merged, tmp_path / "merged", config_from=model)
    for name, source in (("folder", saved), ("save", saved / "global_step2")):
        out = tmp_path / name
        llava_convert.convert(source, to="official", out=out, config_from=model)
        verdict = llava_convert.verify(merged, out, config_from=model, strict=True)
        assert verdict and not verdict.rounded, verdict
