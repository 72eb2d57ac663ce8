"""What was written is held against the plan: a file's header, in all its pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_convert.core.errors import InputError, MismatchError
from llava_convert.engine.check import check_headers
from llava_convert.engine.plan import make_plan
from llava_convert.engine.shards import Shard
from llava_convert.model.target import FileSet, Target
from llava_convert.storage.gguf.file import Typed, read_gguf

WORDS = tuple(f"w{number}" for number in range(5000))


@pytest.fixture
def shards() -> tuple[Shard, ...]:
    """Two GGUF files without tensors that have one vocabulary."""
    words = Typed("[str]", WORDS)
    sets = tuple(
        FileSet((), "", stem, None, "gguf", {"a": words, "name": Typed("str", stem), "b": words}) for stem in ("x", "y")
    )
    return make_plan(Target("gguf", sets, {})).shards


def write(shard: Shard, folder: Path) -> bytearray:
    data = bytearray(shard.size)
    for at, piece in ((0, shard.header), *shard.pieces):
        data[at : at + len(piece)] = piece
    (folder / shard.name).write_bytes(data)
    return data


def test_headers_in_pieces_are_whole_files(shards: tuple[Shard, ...], tmp_path: Path) -> None:
    one, other = shards
    for shard in shards:
        write(shard, tmp_path)
        assert read_gguf(tmp_path / shard.name).metadata["b"].value == WORDS
    assert {shard.name for shard in shards} == check_headers(shards, tmp_path).keys()
    assert one.pieces[0][1] is other.pieces[0][1]


@pytest.mark.parametrize("piece", range(5))
def test_a_byte_that_was_lost_in_any_piece_is_noticed(shards: tuple[Shard, ...], tmp_path: Path, piece: int) -> None:
    shard = shards[0]
    pieces = ((0, shard.header), *shard.pieces)
    assert len(pieces) == 5
    data = write(shard, tmp_path)
    at, whole = pieces[piece]
    data[at + len(whole) - 1] ^= 1
    (tmp_path / shard.name).write_bytes(data)
    with pytest.raises(MismatchError, match="its header is not the planned one"):
        check_headers([shard], tmp_path)


def test_a_file_that_ends_within_its_header_is_an_error(shards: tuple[Shard, ...], tmp_path: Path) -> None:
    data = write(shards[0], tmp_path)
    (tmp_path / shards[0].name).write_bytes(data[:-40])
    with pytest.raises((InputError, MismatchError)):
        check_headers(shards[:1], tmp_path)
