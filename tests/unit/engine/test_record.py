"""conversion.json: each tensor's bytes can be found again by what it says, and the way back undone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llava_convert
from llava_convert._version import __version__
from llava_convert.core.errors import InputError
from llava_convert.engine.record import dropped_texts, dump
from llava_convert.model.checkpoint import Dropped
from llava_convert.model.record import RECORD, read_record
from llava_convert.storage.remote.session import Session
from llava_convert.storage.sidecars import folder_sidecars


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("provenance")
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=out / "official")
    llava_convert.convert(out / "official", to="hf", out=out / "hf")
    llava_convert.convert(out / "hf", to="official", out=out / "back")
    return {name: out / name for name in ("official", "hf", "back")}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return found


def test_copied_bytes_are_where_it_says(folders: dict[str, Path]) -> None:
    source, tensors = folders["official"], load_file(folders["hf"] / "model.safetensors")
    found = record(folders["hf"])["tensors"]
    assert found.keys() == tensors.keys()
    copied = 0
    for name, entry in found.items():
        assert (entry["from"], entry["file"], entry["stored"]) == ("source", "model.safetensors", "F16")
        assert entry["shape"] == list(tensors[name].shape)
        if "ops" not in entry:
            raw = (source / entry["file"]).read_bytes()[entry["offset"] : entry["offset"] + entry["length"]]
            assert raw == bytes(tensors[name].flatten().view(torch.uint8).numpy())
            copied += 1
    assert copied == 78


def test_ops_and_their_operands(folders: dict[str, Path]) -> None:
    found = record(folders["official"])["tensors"]
    key = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    merge, cast = found[key]["ops"]
    assert (merge["op"], merge["scale"], cast) == ("merge_lora", 2.0, {"op": "cast", "dtype": "F16"})
    assert found[key]["from"] == "visual-encoder", "the weight is the base's"
    assert [(one["from"], one["file"]) for one in merge["inputs"]] == [("source", "iter_2.pth")] * 2
    assert found["model.norm.weight"]["ops"] == [{"op": "cast", "dtype": "F16"}]
    assert found["model.norm.weight"]["from"] == "source"


def test_sources_are_identified(folders: dict[str, Path]) -> None:
    found = record(folders["hf"])
    assert found["tool"]["name"] == "llava-convert" and found["tool"]["version"] == __version__
    assert found["layout"] == {"from": "official", "to": "hf"}
    (source,) = found["sources"]
    (file,) = source["files"]
    path = folders["official"] / "model.safetensors"
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    assert (file["file"], file["size"]) == ("model.safetensors", len(raw))
    assert file["sha256"] in {hashlib.sha256(header).hexdigest(), hashlib.sha256(header[8:]).hexdigest()}
    roles = [one["role"] for one in record(folders["official"])["sources"]]
    assert roles == ["source", "visual-encoder"]


def test_added_rows_and_tokens(folders: dict[str, Path]) -> None:
    found = record(folders["hf"])["added"]
    assert found["rows"] == {"from": 512, "to": 576}
    assert [token["content"] for token in found["tokens"]] == ["<unk>", "<image>", "<pad>"]
    assert "added" not in record(folders["official"]) and "added" not in record(folders["back"])
    taken = record(folders["back"])["tensors"]["model.embed_tokens.weight"]["ops"]
    assert taken == [{"op": "take_rows", "rows": 512}]


def test_unrecorded_rows_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without the record nothing says that rows were added: they are a part of the model."""
    for file in folders["hf"].iterdir():
        if file.name != RECORD:
            (tmp_path / "hf").mkdir(exist_ok=True)
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    llava_convert.convert(tmp_path / "hf", to="official", out=tmp_path / "official")
    found = load_file(tmp_path / "official" / "model.safetensors")
    assert found["model.embed_tokens.weight"].shape == (576, 64)
    assert json.loads((tmp_path / "official" / "config.json").read_text())["vocab_size"] == 576


def test_the_record_holds_the_tower(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        vision = record(folder)["vision_config"]
        assert (vision["image_size"], vision["hidden_size"], vision["model_type"]) == (56, 32, "clip_vision_model")
        assert "_name_or_path" not in vision


def test_dump_is_one_line_a_tensor() -> None:
    head, tensors = {"tool": {"name": "é"}}, {"a": {"shape": [1]}, "b": {"shape": [2]}}
    text = dump(head, tensors.items()).decode()
    assert json.loads(text) == {**head, "tensors": tensors}
    assert '    "a": {"shape": [1]},\n    "b": {"shape": [2]}\n' in text and "é" in text


@pytest.mark.parametrize("text", ["[]", "3", "{", "{'a': 1}", '"x"'])
def test_a_broken_record_is_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match=RECORD):
        read_record(folder_sidecars(tmp_path))


def test_no_record(tmp_path: Path) -> None:
    assert read_record(folder_sidecars(tmp_path)) is None


@pytest.mark.parametrize("rows", [{"from": 10**9, "to": 10**9 + 64}, {"from": 512, "to": 4096}])
def test_a_record_of_other_rows_is_not_believed(folders: dict[str, Path], tmp_path: Path, rows: dict[str, int]) -> None:
    """A record which does not fit the weights must not make rows of nothing, nor take away what was not added."""
    source = tmp_path / "hf"
    source.mkdir()
    for file in folders["hf"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    found = record(source)
    found["added"]["rows"] = rows
    (source / RECORD).write_text(json.dumps(found))
    try:
        llava_convert.convert(source, to="official", out=tmp_path / "official")
    except InputError:
        assert not (tmp_path / "official").exists()
        return
    assert load_file(tmp_path / "official" / "model.safetensors")["model.embed_tokens.weight"].shape == (576, 64)


def test_drops_are_told_once_a_reason(tiny: Path) -> None:
    from llava_convert.app.options import Options
    from llava_convert.app.planning import prepare

    checkpoint = prepare(tiny / "iter_2.pth", Options(to="official"), Session()).checkpoint
    drops = [Dropped("a.inv_freq", "a buffer"), Dropped("b.inv_freq", "a buffer"), Dropped("c", "no use")]
    assert checkpoint.dropped == ()
    assert dropped_texts(checkpoint, drops) == ["left out 2 (a buffer): a.inv_freq, …", "left out 1 (no use): c"]


def test_a_full_verification_records_what_was_verified(tiny: Path, tmp_path: Path) -> None:
    """Whoever passes the output on can prove that it is what was verified: every file but the record and the card."""
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "out", verify="full")
    found = record(tmp_path / "out")["verified"]
    here = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found["level"] == "full" and set(found["files"]) == set(here) - {"README.md", "conversion.json"}
    for name, one in found["files"].items():
        data = here[name].read_bytes()
        assert one == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name


def test_a_quick_verification_vouches_for_no_bytes(folders: dict[str, Path]) -> None:
    assert record(folders["hf"])["verified"] == {"level": "quick"}
