"""What real torch, accelerate and transformers save on two and three processes is read to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llava_convert
from tests.conftest import CHECKOUT

FORMS = [
    ("fsdp2", 2),
    pytest.param("fsdp2", 3, marks=pytest.mark.sweep),
    pytest.param("accelerate_fsdp2", 3, marks=pytest.mark.sweep),
    pytest.param("accelerate_fsdp1", 3, marks=pytest.mark.sweep),
    ("fsdp1", 2),
    ("fsdp1_full", 2),
    pytest.param("two_ways", 3, marks=pytest.mark.sweep),
    pytest.param("a_grid", 2, marks=pytest.mark.sweep),
    pytest.param("ranks", 3, marks=pytest.mark.sweep),
    ("hf_dcp", 2),
    pytest.param("safetensors_writer", 3, marks=pytest.mark.sweep),
]


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shares") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", dtype="bfloat16", out=out)
    return out


@pytest.mark.parametrize(("form", "processes"), FORMS)
def test_shares_of_real_writers(model: Path, tmp_path: Path, form: str, processes: int) -> None:
    script = CHECKOUT / "tests" / "peers" / "save_shares.py"
    command = [sys.executable, script, form, model, tmp_path / "saved", str(processes)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=600)
    complete = (tmp_path / "saved" / "tokenizer.json").is_file()
    config = None if complete else model
    llava_convert.convert(tmp_path / "saved", to="official", out=tmp_path / "official", config_from=config)
    verdict = llava_convert.verify(model, tmp_path / "official")
    assert verdict, verdict
