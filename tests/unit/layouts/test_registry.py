"""What is said of a path that no layout claims: what it is instead, and what to give."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.registry import open_checkpoint


def refused(path: Path) -> tuple[str, str]:
    with pytest.raises(UnsupportedError) as found:
        open_checkpoint(path)
    return found.value.message, found.value.hint or ""


@pytest.fixture(scope="module")
def hf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out)
    return out


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_model_leads_to_its_folder(hf: Path, file: str) -> None:
    message, hint = refused(hf / file)
    assert file in message and hint.endswith("give that folder") and str(hf) in hint
    assert open_checkpoint(hf)[0].layout == "hf"


def test_a_folder_around_a_checkpoint_leads_to_the_newest(tiny: Path, tmp_path: Path) -> None:
    for number, age in ((2, 100), (10, 50), (4, 200)):
        shutil.copy(tiny / "iter_2.pth", tmp_path / f"iter_{number}.pth")
        os.utime(tmp_path / f"iter_{number}.pth", (age, age))
    (tmp_path / "notes.txt").write_text("nothing")
    message, hint = refused(tmp_path)
    assert str(tmp_path) in message and hint == f"it holds iter_4.pth: give {tmp_path / 'iter_4.pth'}"


def test_what_is_nothing_has_no_hint(tmp_path: Path) -> None:
    assert refused(tmp_path)[1] == "" and "the folder is empty" in refused(tmp_path)[0]
    (tmp_path / "notes.txt").write_text("nothing")
    assert refused(tmp_path / "notes.txt")[1] == ""


def test_a_cut_file_of_weights_is_told(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        open_checkpoint(tmp_path / "cut.safetensors")


def test_another_layout_is_named_with_the_path_as_it_was_given(tiny: Path) -> None:
    with pytest.raises(UnsupportedError) as found:
        open_checkpoint(tiny / "iter_2.pth", "official")
    assert f"llava-convert pth {tiny / 'iter_2.pth'}" in str(found.value.hint)
