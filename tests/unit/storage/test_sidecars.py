"""The files beside the weights: of a folder, and made of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_convert.assets.tokenizer.files import has_tokenizer, open_tokenizer
from llava_convert.core.errors import InputError
from llava_convert.storage.sidecars import folder_sidecars, made_sidecars


def test_those_of_a_folder(tmp_path: Path) -> None:
    files = folder_sidecars(tmp_path)
    assert files.names() == frozenset() and not files.has("config.json")
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "tokenizer.model").write_bytes(b"\0pieces")
    (tmp_path / "more").mkdir()
    assert files.names() == {"config.json", "tokenizer.model"}
    assert files.has("config.json") and not files.has("more")
    assert files.read("tokenizer.model") == b"\0pieces"
    assert files.read_object("config.json") == {"a": 1}
    (tmp_path / "tokenizer.model").write_bytes(b"others")
    assert files.read("tokenizer.model") == b"\0pieces", "it is read once"
    assert folder_sidecars(tmp_path).read("tokenizer.model") == b"others", "and not kept for others"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", r"expected a JSON object, found list"),
        (b"{", r"config\.json: not JSON"),
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_json_file_that_is_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        folder_sidecars(tmp_path).read_object("config.json")


def test_made_ones_are_made_once_and_only_when_asked_for() -> None:
    calls: list[int] = []

    def make() -> dict[str, bytes]:
        calls.append(1)
        return {"generation_config.json": b'{"eos_token_id": 2}'}

    files = made_sidecars(Path("x.gguf"), make)
    assert calls == []
    assert files.names() == {"generation_config.json"} and not files.has("tokenizer.json")
    assert files.read_object("generation_config.json") == {"eos_token_id": 2}
    assert calls == [1]
    assert not has_tokenizer(files)
    with pytest.raises(InputError, match=r"x\.gguf: no tokenizer"):
        open_tokenizer(files)


def test_a_tokenizer_is_parsed_once_for_its_files_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    files = folder_sidecars(tmp_path)
    first = open_tokenizer(files)
    assert open_tokenizer(files) is first and first.size == 1
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert open_tokenizer(folder_sidecars(tmp_path)).size == 2
