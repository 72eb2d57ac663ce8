"""Folders that transformers itself writes, in every dialect of names, back through our converter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_convert
from tests.golden.oracle import assert_same_weights
from tests.interop.conftest import GOLDEN, Converter
from tests.interop.peer_programs import in_peer

NAMES = ("tiny", *GOLDEN)
# Where a dialect has one tensor of the tower and the head: the table of the formats reference.
TOWER, HEAD = "embeddings.class_embedding", "lm_head.weight"
CLASSIC = (f"vision_tower.vision_model.{TOWER}", f"language_model.{HEAD}")
FRESH = (f"vision_tower.{TOWER}", f"language_model.{HEAD}")
STATE_DICT = (f"model.vision_tower.{TOWER}", HEAD)
STATE_DICT_BEFORE_56 = (f"model.vision_tower.vision_model.{TOWER}", HEAD)


def _official(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    llava_convert.convert(folder, to="official", out=out, verify="full")
    return load_file(out / "model.safetensors")


def _check(saved: Path, converted: Converter, name: str, out: Path, dialect: tuple[str, str]) -> None:
    """The saved folder has the dialect's names, and gives the weights that the checkpoint gives directly.

    The vocabulary keeps the rows that were added, since transformers does not keep our record of them; a tower which
    was frozen is in `hf` and so in what comes from it.
    """
    assert set(dialect) <= load_file(saved / "model.safetensors").keys()
    ours = _official(saved, out)
    wanted = _official(converted(name, "hf"), out.with_name("wanted"))
    rows = wanted[HEAD].shape[0]
    assert ours[HEAD].shape[0] == 576 and rows == 512
    assert_same_weights(ours, wanted, rows=rows)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again(converted: Converter, tmp_path: Path, name: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(converted(name, "hf"), dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    _check(tmp_path / "saved", converted, name, tmp_path / "official", CLASSIC)


@pytest.mark.parametrize("name", NAMES)
def test_saved_from_a_config(converted: Converter, tmp_path: Path, name: str) -> None:
    loaded = LlavaForConditionalGeneration.from_pretrained(converted(name, "hf"), dtype="auto")
    fresh = LlavaForConditionalGeneration(loaded.config).to(torch.float16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(tmp_path / "saved")
    _check(tmp_path / "saved", converted, name, tmp_path / "official", FRESH)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_of_a_trainer(converted: Converter, tmp_path: Path, name: str) -> None:
    folder = converted(name, "hf")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    saved = tmp_path / "saved"
    saved.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, saved / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(saved)
    assert "rope_theta" not in json.loads((saved / "config.json").read_text())["text_config"]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        shutil.copy(folder / file, saved)
    _check(saved, converted, name, tmp_path / "official", STATE_DICT)
    # This release writes rope_parameters only, which older ones do not know.
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert config["rope_theta"] == 500000.0


@pytest.mark.peers
@pytest.mark.parametrize("version", ["4.37", "4.46", "4.57"])
def test_saved_by_older_releases(converted: Converter, tmp_path: Path, version: str) -> None:
    names = ("tiny", "b_llmlora_vitlora")
    job = [{"folder": str(converted(name, "hf")), "out": str(tmp_path / name)} for name in names]
    in_peer(f"transformers-{version}", "save_hf.py", job, tmp_path)
    for name in names:
        _check(tmp_path / name / "saved", converted, name, tmp_path / name / "one" / "official", CLASSIC)
        dialect = STATE_DICT_BEFORE_56 if version == "4.57" else CLASSIC
        _check(tmp_path / name / "state_dict", converted, name, tmp_path / name / "two" / "official", dialect)
