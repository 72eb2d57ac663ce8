"""The table of kinds: rows are checked when it is loaded, and the first that fits is meant."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from llava_convert.core.errors import InputError
from llava_convert.layouts.kinds import NotAModelError, known, refusal
from llava_convert.layouts.registry import look, recognise
from llava_convert.model.tables.kinds import parse_kinds
from llava_convert.model.tables.patterns import TableError

ROW = '[[kind]]\nname = "a"\nis = "an a"\nuse = "nothing"\nnext = "llava-convert inspect {path}"\n'


@pytest.mark.parametrize(
    "text",
    [
        ROW,  # no condition at all
        ROW + 'when = { place = "file" }',
        ROW + 'when = { place = "file", colour = "red" }',
        ROW + 'when = { place = "file", suffix = [] }',
        ROW.replace("nothing", "") + 'when = { suffix = ".a" }',
        ROW.replace("{path}", "{there}") + 'when = { suffix = ".a" }',
        ROW.replace("{path}", "{inner}") + 'when = { suffix = ".a" }',
        (ROW + 'when = { suffix = ".a" }\n') * 2,
    ],
    ids=["no when", "place alone", "unknown", "empty", "no text", "unknown word", "inner without a pattern", "twice"],
)
def test_a_row_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises((TableError, KeyError)):
        parse_kinds(text, Path("kinds.toml"))


def test_the_first_row_that_fits_is_meant(tmp_path: Path) -> None:
    """An adapter's folder holds a language model's names, too; a picture may end in .md."""
    (tmp_path / "picture.md").write_bytes(b"\x89PNG\r\n\x1a\n")
    told = known(look(tmp_path / "picture.md"))
    assert told is not None and told.kind == "picture"


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "picture"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "picture"),
        (b"PAR1\x15\x04", "data set"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"tjgg\x03\0\0\0", "GGML"),
        (b"\x93NUMPY\x01\0", "NumPy"),
        (b"\x1f\x8b\x08\0", "compressed"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\0" * 257 + b"ustar\x0000", "tar"),
        (struct.pack(">I", 32) + b"ftypmp42", "video"),
        (b"\x08\x08\x12\x07pytorch", "ONNX file"),
        (b"PK\x03\x04\x14\0", "zip"),
    ],
)
def test_first_bytes_tell_whatever_the_name(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "thing"
    path.write_bytes(start + b"\0" * 600)
    told = known(look(path))
    assert told is not None and told.kind == kind


def test_texts_are_filled_in_and_commands_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoint-10").mkdir()
    told = known(look(folder))
    assert told is not None and told.next == f"llava-convert inspect '{folder}/checkpoint-10'"


def test_a_hostile_name_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x\x1b[31m", "architectures": ["GPTForCausalLM"]}))
    error = refusal(look(tmp_path))
    assert isinstance(error, NotAModelError) and "\x1b" not in error.message and "\\x1b" in error.message


def test_broken_things_break_nothing(tmp_path: Path) -> None:
    """What cannot be read is as if it were not there: a broken config, weights that are cut, a pickle of junk."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "a.bin").write_bytes(b"\x80\x02junk")
    (tmp_path / "tokenizer.json").write_text("{")
    assert known(look(tmp_path)) is None
    assert "the folder holds" in refusal(look(tmp_path)).message
    (tmp_path / "list.json").write_text("[1, 2")
    assert known(look(tmp_path / "list.json")) is None


def test_a_list_is_told_by_its_first_object_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"id": 1, "conversations": []}, ' + "x" * (3 << 20))  # never parsed to its end
    told = known(look(path))
    assert told is not None and told.kind == "training data"
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"messages": []}\n{"messages": []}\n')
    told = known(look(lines))
    assert told is not None and told.kind == "training data"


def test_what_a_reader_chokes_on_is_named_instead(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(NotAModelError, match="the state of an optimizer"):
        recognise(tmp_path / "optimizer.pt")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "optimizer.pt").read_bytes()[:200])
    with pytest.raises(InputError):  # a broken file is no zip archive of something else
        recognise(tmp_path / "cut.pth")
