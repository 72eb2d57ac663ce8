"""What is said of a path that no layout claims: what it is instead, and what to give."""

from __future__ import annotations

import os
import re
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


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_small_file_of_a_model_leads_to_its_folder(hf: Path, file: str) -> None:
    message, hint = refused(hf / file)
    assert file in message and hint == f"`llava-convert inspect {hf}`"
    assert open_checkpoint(hf)[0].layout == "hf"


def test_a_file_of_weights_means_its_model(hf: Path) -> None:
    checkpoint, why = open_checkpoint(hf / "model.safetensors")
    assert (checkpoint.layout, checkpoint.path) == ("hf", hf)
    assert why.endswith("model.safetensors is a file of it")


def test_a_file_that_is_named_counts_where_the_folder_has_two(hf: Path, tmp_path: Path) -> None:
    """The hint of a folder with two sets of weights is to name the file: that is followed here."""
    both = Path(shutil.copytree(hf, tmp_path / "both"))
    shutil.copy(both / "model.safetensors", both / "pytorch_model.safetensors")
    with pytest.raises(UnsupportedError, match="ambiguous") as found:
        open_checkpoint(both)
    named = re.search(r"such as (\S+),", str(found.value.hint))
    assert named is not None and open_checkpoint(Path(named[1]))[0].files == (Path(named[1]),)


def test_one_of_several_shards_means_all_of_them(hf: Path, tmp_path: Path) -> None:
    llava_convert.convert(hf, to="official", out=tmp_path / "out", max_shard_size="200KB")
    shard = min((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert open_checkpoint(shard)[0].files == open_checkpoint(tmp_path / "out")[0].files


def test_a_folder_of_a_training_means_the_checkpoint_of_the_most_steps(tiny: Path, tmp_path: Path) -> None:
    for number, age in ((2, 100), (10, 50), (4, 200)):  # copies and downloads change the times
        shutil.copy(tiny / "iter_2.pth", tmp_path / f"iter_{number}.pth")
        os.utime(tmp_path / f"iter_{number}.pth", (age, age))
    (tmp_path / "notes.txt").write_text("nothing")
    checkpoint, why = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "iter_10.pth"
    assert why.endswith(f"iter_10.pth is the newest of 3 checkpoints in {tmp_path}")


def test_a_folder_around_a_checkpoint_leads_to_it(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "inner")
    (tmp_path / "notes.xyz").write_text("nothing")
    message, hint = refused(tmp_path)
    assert "a folder around a checkpoint" in message and hint == f"`llava-convert inspect {tmp_path / 'inner'}`"


def test_what_is_nothing_is_told_what_is_read(tmp_path: Path) -> None:
    message, hint = refused(tmp_path)
    assert "the folder is empty" in message and "`llava-convert layouts`" in hint
    (tmp_path / "notes").write_text("nothing")
    message, hint = refused(tmp_path / "notes")
    assert "begins with 'nothing'" in message and "`llava-convert layouts`" in hint
    assert "the folder holds notes" in refused(tmp_path)[0]


def test_a_cut_file_of_weights_is_told(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        open_checkpoint(tmp_path / "cut.safetensors")


def test_another_layout_is_named_with_the_path_as_it_was_given(tiny: Path) -> None:
    with pytest.raises(UnsupportedError) as found:
        open_checkpoint(tiny / "iter_2.pth", "official")
    assert f"llava-convert pth {tiny / 'iter_2.pth'}" in str(found.value.hint)
