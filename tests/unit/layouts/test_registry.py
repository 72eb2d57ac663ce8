"""What is said of a path that no layout claims: what it is instead, and what to give."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.core.tensors import Extent
from llava_convert.layouts.registry import open_checkpoint, recognise
from tests.share_folders import cut, write_classic
from tests.zero_folders import Save
from tests.zero_folders import write as write_zero


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


def tensors(path: Path, name: str | None = None, config_from: Path | None = None) -> dict[str, tuple[Extent, ...]]:
    checkpoint = recognise(path, name, config_from).open()
    return {name: tensor.extents for name, tensor in checkpoint.tensors().items()}


def test_the_weights_of_a_folder_stand_for_it(hf: Path) -> None:
    found = recognise(hf / "model.safetensors").open()
    assert (found.layout, found.path) == ("hf", hf)
    assert tensors(hf / "model.safetensors") == tensors(hf)


def test_a_named_file_is_the_one_that_counts(hf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf, tmp_path / "two")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    found = recognise(folder / "pytorch_model.bin").open()
    assert found.files == (folder / "pytorch_model.bin",) and not found.as_written
    assert recognise(folder).open().files == (folder / "model.safetensors",)


def test_a_shard_stands_for_all_that_its_index_names(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", max_shard_size="200KB", out=folder)
    shard = sorted(folder.glob("*-of-*.safetensors"))[1]
    assert tensors(shard) == tensors(folder) == tensors(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_state_dict_alone_takes_the_config_of_another_folder(hf: Path, tmp_path: Path, suffix: str) -> None:
    state, file = load_file(hf / "model.safetensors"), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state}, file)
    message, hint = refused(file)
    assert str(file) in message and "without a config" in message and f"{file} --config-from FOLDER" in hint
    found = recognise(file, None, hf).open()
    assert (found.layout, found.path, found.root, found.files) == ("hf", file, tmp_path, (file,))
    assert set(found.tensors()) == set(tensors(hf))
    llava_convert.convert(file, to="official", out=tmp_path / "official", config_from=hf)
    assert llava_convert.verify(hf, tmp_path / "official")
    assert llava_convert.verify(hf, file, config_from=hf) and llava_convert.verify(file, hf, config_from=hf)


def test_a_folder_without_a_config_is_no_source_of_it(tiny: Path, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model folder: it has no config"):
        recognise(hf / "model.safetensors", None, tmp_path)
    with pytest.raises(UsageError, match=r"config_from does not apply: iter_2\.pth is pth"):
        llava_convert.plan(tiny / "iter_2.pth", to="hf", config_from=hf)


class Whole(torch.nn.Module):
    """A model that is pickled whole."""


def test_a_pickled_model_is_refused_with_the_line_that_makes_a_state_dict(tmp_path: Path) -> None:
    torch.save(Whole(), tmp_path / "model.pth")
    message, hint = refused(tmp_path / "model.pth")
    assert "a whole object in place of its weights" in message
    assert "torch.save(m.state_dict(), 'weights.pth')" in message and "--config-from" in hint


def shares(hf: Path, folder: Path) -> Path:
    """The weights of a folder in a distributed checkpoint of two ranks, alone."""
    state = load_file(hf / "model.safetensors")
    parts = {name: (t.shape, cut(t, 0, 2 if t.ndim else 1)) for name, t in state.items()}
    return write_classic(folder, parts)


def test_a_distributed_checkpoint_takes_the_config_beside_around_or_elsewhere(hf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf, tmp_path / "run", ignore=shutil.ignore_patterns("model.safetensors"))
    inner = shares(hf, folder / "pytorch_model_fsdp_0")
    alone = shares(hf, tmp_path / "alone" / "shares")
    for found in (recognise(folder), recognise(inner), recognise(alone, None, hf)):
        assert (found.layout, set(found.open().tensors())) == ("hf", set(tensors(hf)))
    with pytest.raises(InputError) as refusal:
        recognise(alone)
    assert "is a distributed checkpoint of torch" in refusal.value.message
    assert "--config-from" in str(refusal.value.hint)
    llava_convert.convert(folder, to="hf", out=tmp_path / "whole")
    assert llava_convert.verify(hf, tmp_path / "whole")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_folder_of_a_trainer(hf: Path, tmp_path: Path, stage: int) -> None:
    """Config and tokenizer, `latest`, and no gathered weights: the masters are read."""
    folder = shutil.copytree(hf, tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns("model.safetensors"))
    state = {name: tensor.float() for name, tensor in load_file(hf / "model.safetensors").items()}
    write_zero(folder / "global_step2", Save(state, stage=stage, ranks=3))
    (folder / "latest").write_text("global_step2")
    for source in (folder, folder / "global_step2"):
        llava_convert.convert(source, to="official", dtype="float16", out=tmp_path / "official", force=True)
        assert llava_convert.verify(hf, tmp_path / "official")
    alone = shutil.copytree(folder / "global_step2", tmp_path / "elsewhere" / "global_step2")
    llava_convert.convert(alone, to="official", dtype="float16", out=tmp_path / "official", force=True, config_from=hf)
    assert llava_convert.verify(hf, tmp_path / "official")
    message, hint = refused(alone)
    assert "a name of xtuner's (" in message and "--config-from FOLDER" in hint


def test_a_folder_of_a_training_means_the_checkpoint_of_the_most_steps(tiny: Path, tmp_path: Path) -> None:
    for number, age in ((2, 100), (10, 50), (4, 200)):  # copies and downloads change the times
        shutil.copy(tiny / "iter_2.pth", tmp_path / f"iter_{number}.pth")
        os.utime(tmp_path / f"iter_{number}.pth", (age, age))
    (tmp_path / "notes.txt").write_text("nothing")
    checkpoint, _ = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "iter_10.pth"
    assert checkpoint.notes[0] == f"iter_10.pth is the newest of 3 checkpoints in {tmp_path}"


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


def test_a_file_that_could_not_be_read_is_not_taken_for_something_else(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses once; the next read would find tensors of an adapter there, as in each partial .pth."""
    path, really, refused = tiny / "iter_2.pth", os.open, []

    def refuse_once(wanted: Any, *args: Any, **more: Any) -> int:
        if not refused and not isinstance(wanted, int) and Path(os.fsdecode(wanted)) == path:
            refused.append(wanted)
            raise OSError(errno.EIO, "Input/output error", os.fspath(path))
        return really(wanted, *args, **more)

    monkeypatch.setattr(os, "open", refuse_once)
    with pytest.raises(InputError, match="cannot be read: Input/output error"):
        recognise(path)
    assert refused
    assert recognise(path).layout == "pth"


def test_another_layout_is_named_with_the_path_as_it_was_given(tiny: Path) -> None:
    with pytest.raises(UnsupportedError) as found:
        open_checkpoint(tiny / "iter_2.pth", "official")
    assert f"llava-convert pth {tiny / 'iter_2.pth'}" in str(found.value.hint)
