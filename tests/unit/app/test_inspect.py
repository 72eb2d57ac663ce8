"""inspect: what a checkpoint is, what it lacks, what it can become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.info import TARGETS

JSON_KEYS = {
    "source", "layout", "why", "kind", "use", "next", "parts", "settings", "targets", "notes", "warnings", "details",
    "bytes_fetched",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspection")
    for layout in ("xtuner", "official", "hf"):
        llava_convert.convert(tiny / "iter_2.pth", to=layout, out=out / layout)
    return out


def test_a_training_checkpoint(tiny: Path) -> None:
    found = llava_convert.inspect(tiny / "iter_2.pth")
    assert (found.layout, found.path) == ("pth", tiny / "iter_2.pth")
    assert "61 of 61" in found.why
    llm, tower, projector = sorted(found.parts, key=lambda p: ["llm", "visual-encoder", "projector"].index(p.name))
    assert (llm.state, llm.tensors, llm.dtypes, llm.detail) == ("full", 21, ("float32",), "")
    assert (tower.state, tower.tensors) == ("lora", 36)
    assert tower.detail.startswith("LoRA r=8 alpha=16 on 18 modules; base model ")
    assert (projector.state, projector.tensors, projector.bytes) == ("full", 4, 4 * (64 * 32 + 64 + 64 * 64 + 64))
    why_not = found.targets.pop("peft")
    assert why_not is not None and "was trained whole" in why_not
    assert found.targets == dict.fromkeys(TARGETS.keys() - {"peft", "pth"})
    assert found.settings["feature layer"] == -2


def test_a_gguf_becomes_no_adapter(made: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "hf", to="gguf", out=tmp_path / "gguf")
    why_not = llava_convert.inspect(tmp_path / "gguf").targets["peft"]
    assert why_not is not None and "holds no adapter of the model" in why_not


@pytest.mark.parametrize("layout", ["xtuner", "official", "hf"])
def test_each_layout(made: Path, layout: str) -> None:
    found = llava_convert.inspect(made / layout)
    assert found.layout == layout and found.why
    assert found.targets.keys() == TARGETS.keys() - {layout}
    states = {part.name: part.state for part in found.parts}
    assert states == {"llm": "full", "visual-encoder": "lora" if layout == "xtuner" else "full", "projector": "full"}


def test_what_is_missing_and_how_to_supply_it(made: Path, tiny: Path) -> None:
    found = llava_convert.inspect(made / "xtuner")
    for target in ("official", "hf"):
        problem = found.targets[target]
        assert problem is not None
        assert "base vision tower 'vit' was not found" in problem and "visual_encoder=PATH" in problem
    supplied = llava_convert.inspect(made / "xtuner", visual_encoder=str(tiny / "vit"))
    supplied.targets.pop("peft")  # its language model was trained whole
    assert supplied.targets == dict.fromkeys(TARGETS.keys() - {"xtuner", "peft"})


def test_as_json(made: Path) -> None:
    value = json.loads(json.dumps(llava_convert.inspect(made / "xtuner").as_json()))
    assert value.keys() == JSON_KEYS
    assert value["targets"]["hf"]["possible"] is False and "visual_encoder=PATH" in value["targets"]["hf"]["missing"]
    assert value["parts"]["llm"].keys() == {"state", "tensors", "bytes", "dtypes", "detail"}


def test_a_work_dir(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "iter_2.pth", tmp_path / "iter_2.pth")
    (tmp_path / "last_checkpoint").write_text("/gone/work_dirs/run/iter_2.pth")
    found = llava_convert.inspect(tmp_path)
    assert (found.layout, found.path) == ("pth", tmp_path / "iter_2.pth")
    (tmp_path / "iter_2.pth").unlink()
    with pytest.raises(InputError, match=r"last_checkpoint names '?iter_2\.pth'?, which does not exist"):
        llava_convert.inspect(tmp_path)


def test_what_is_no_llava(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    found = llava_convert.inspect(tmp_path / "bert")
    assert (found.layout, found.kind, found.targets) == (None, "the config of a bert, without weights", {})
    assert repr(found) == f"Inspection({tmp_path / 'bert'}: the config of a bert, without weights)"
    with pytest.raises(UnsupportedError, match="is the config of a bert, without weights"):
        llava_convert.convert(tmp_path / "bert", to="hf", out=tmp_path / "out")
    (tmp_path / "bert" / "config.json").unlink()
    (tmp_path / "bert").rmdir()
    with pytest.raises(UnsupportedError, match="the folder is empty"):
        llava_convert.inspect(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        llava_convert.inspect(tmp_path / "absent")
