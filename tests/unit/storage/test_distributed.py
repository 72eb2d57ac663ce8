"""Shares that several processes saved, put together: by torch's own classes, cut in every way, and damaged."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.tensors import Extent, StoredTensor, Stripe, Striped
from llava_convert.core.tensors import cut as bytes_of
from llava_convert.storage.distributed import read_distributed, recognise
from llava_convert.storage.distributed.chunks import Budget, Chunk, put_together
from llava_convert.storage.headers import Headers
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_bytes, read_whole
from tests.share_folders import cut, write_classic

NUMBERS = torch.Generator().manual_seed(5)
ROWS = torch.randn(7, 4, generator=NUMBERS).bfloat16()
COLUMNS = torch.randn(4, 7, generator=NUMBERS)
ALONE = torch.randn(5, generator=NUMBERS)


def read(folder: Path) -> dict[str, StoredTensor]:
    return read_distributed(folder, [path.name for path in folder.iterdir()], Headers()).tensors


def assert_equal(found: dict[str, StoredTensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    with FilePool() as pool:
        for name, tensor in expected.items():
            assert found[name].shape == tuple(tensor.shape)
            assert read_whole(pool, found[name]).tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def three(folder: Path, **more: Any) -> Path:
    """By rows, by columns, and whole."""
    tensors = {
        "rows": (ROWS.shape, cut(ROWS, 0, 3)),
        "columns": (COLUMNS.shape, cut(COLUMNS, 1, 3)),
        "alone": (ALONE.shape, cut(ALONE, 0, 1)),
    }
    return write_classic(folder, tensors, **more)


def test_parts_by_rows_and_by_columns_make_the_whole(tmp_path: Path) -> None:
    folder = three(tmp_path / "c")
    assert recognise(folder, [".metadata"]) == "a distributed checkpoint of torch"
    assert_equal(read(folder), {"rows": ROWS, "columns": COLUMNS, "alone": ALONE})


def test_a_box_in_eight_parts(tmp_path: Path) -> None:
    box = torch.randn(3, 5, 4, generator=NUMBERS)
    parts = [
        ((i, j, k), box[i : i + 2, j : j + 3, k : k + 2].contiguous()) for i in (0, 2) for j in (0, 3) for k in (0, 2)
    ]
    assert_equal(read(write_classic(tmp_path / "c", {"box": (box.shape, parts)})), {"box": box})


def test_any_bytes_of_what_was_split_by_columns(tmp_path: Path) -> None:
    """More rows than are read at once, from and to the middle of a row."""
    matrix = torch.randn(5000, 130, generator=NUMBERS)
    found = read(write_classic(tmp_path / "c", {"w": (matrix.shape, cut(matrix, 1, 3))}))["w"]
    data = matrix.numpy().tobytes()
    with FilePool() as pool:
        for start, end in ((0, len(data)), (1, 700_001), (519, 522), (520, 1040), (777, len(data) - 3)):
            buffer = bytearray(end - start)
            read_bytes(pool, found, start, memoryview(buffer), until=len(data))
            assert buffer == data[start:end], (start, end)


def test_copies_of_a_part_count_once(tmp_path: Path) -> None:
    parts = [*cut(ROWS, 0, 2), *cut(ROWS, 0, 2)]
    assert_equal(read(write_classic(tmp_path / "c", {"rows": (ROWS.shape, parts)})), {"rows": ROWS})


def test_only_the_model_is_taken_and_its_root_is_no_part_of_a_name(tmp_path: Path) -> None:
    tensors = {
        "model.model.w": (ROWS.shape, cut(ROWS, 0, 2)),
        "optimizer.state.model.w.exp_avg": (COLUMNS.shape, cut(COLUMNS, 0, 2)),
    }
    paths = {"model.model.w": ("model", "model.w"), "optimizer.state.model.w.exp_avg": ("optimizer", "state", "x")}
    folder = write_classic(tmp_path / "c", tensors, paths=paths)
    found = read_distributed(folder, [".metadata"], Headers())
    assert_equal(found.tensors, {"model.w": ROWS})
    assert found.notes == ("left out what is not the model's: 1 entries of the optimizer and the like",)


# --- damaged ---


def of(metadata: Any, name: str, rank: int) -> Any:
    """Where part `rank` of a tensor lies."""
    return next(place for index, place in metadata.storage_data.items() if (index.fqn, index.index) == (name, rank))


def moved(metadata: Any) -> None:
    of(metadata, "rows", 1).offset = 7


def another(metadata: Any) -> None:
    of(metadata, "rows", 1).offset = of(metadata, "columns", 1).offset
    of(metadata, "rows", 1).length = of(metadata, "columns", 1).length


def overlapping(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["rows"].chunks
    place = metadata.storage_data.pop(MetadataIndex("rows", torch.Size([6, 0]), 2))
    metadata.storage_data[MetadataIndex("rows", torch.Size([4, 0]), 2)] = place
    chunks[2] = ChunkStorageMetadata(torch.Size([4, 0]), chunks[2].sizes)


def larger(metadata: Any) -> None:
    metadata.state_dict_metadata["rows"].size = torch.Size([9, 4])


def outside(metadata: Any) -> None:
    metadata.state_dict_metadata["rows"].size = torch.Size([5, 4])


def nowhere(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex("rows", torch.Size([3, 0]), 1)]


def negative(metadata: Any) -> None:
    of(metadata, "rows", 0).offset = -1


def no_places(metadata: Any) -> None:
    metadata.storage_data = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (moved, "__1_0.distcp"),
        (another, r"rows at \[3, 0\]: \[3, 4\] by the metadata, \[4, 3\] in __1_0.distcp"),
        (overlapping, "rows: none of its parts holds index|rows: its parts overlap"),
        (larger, "rows: 28 of its 36 elements are there: a rank's part is missing"),
        (outside, "lies outside the whole"),
        (nowhere, r"does not say which file holds rows at \[3, 0\]"),
        (negative, "rows has no sound place"),
        (no_places, "has no storage_data"),
    ],
)
def test_metadata_that_contradict_the_files(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(three(tmp_path / "c", change=change))


def test_a_missing_rank(tmp_path: Path) -> None:
    folder = three(tmp_path / "c")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__1_0\.distcp: no such file"):
        read(folder)


def test_a_truncated_rank(tmp_path: Path) -> None:
    folder = three(tmp_path / "c")
    path = folder / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"__2_0\.distcp: truncated: columns ends at byte"):
        read(folder)


def test_truncated_metadata(tmp_path: Path) -> None:
    folder = three(tmp_path / "c")
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="ends early"):
        read(folder)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hurt",)


def test_hostile_metadata_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = three(tmp_path / "c")
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UnsafeError, match="which can run code"):
        read(folder)
    assert not (tmp_path / "hurt").exists()


@pytest.mark.parametrize("file", ["../__0_0.distcp", "/etc/passwd", "a\\b"])
def test_a_file_elsewhere(tmp_path: Path, file: str) -> None:
    def lead_out(metadata: Any) -> None:
        of(metadata, "rows", 0).relative_path = file

    with pytest.raises(UnsafeError, match="not a file of this folder"):
        read(three(tmp_path / "c", change=lead_out))


def a_box(path: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor("", "F32", shape, (Extent(Path(path), 0, 4 * prod(shape)),))


def test_columns_take_the_memory_of_one_row() -> None:
    """However many rows there are: a span for each row of a model of 8B would fill the memory."""
    left, right = Chunk((0, 0), a_box("a", (1_000_000, 1))), Chunk((0, 1), a_box("b", (1_000_000, 2)))
    whole = put_together("w", (1_000_000, 3), [left, right], Path("c"), Budget())
    a, b = Extent(Path("a"), 0, 4), Extent(Path("b"), 0, 8)
    assert whole.extents == Striped((Stripe(1_000_000, ((a, 4), (b, 8))),))
    assert len(whole.extents) == 2_000_000
    assert whole.extents[-1 + 2 * 7] == Extent(Path("b"), 6 * 8, 8)
    assert list(bytes_of(whole.extents, 12 * 5 + 2, 12 * 3)) == [
        Stripe(1, ((Extent(Path("a"), 22, 2), 0),)),
        Stripe(1, ((Extent(Path("b"), 40, 8), 0),)),
        Stripe(2, ((Extent(Path("a"), 24, 4), 4), (Extent(Path("b"), 48, 8), 8))),
        Stripe(1, ((Extent(Path("a"), 32, 2), 0),)),
    ]


def test_more_pieces_than_are_read() -> None:
    halves = [Chunk((0, 0, at), a_box(path, (9, 5, 1))) for at, path in enumerate("ab")]
    assert len(put_together("w", (9, 5, 2), halves, Path("c"), Budget(18)).extents) == 90
    with pytest.raises(UnsupportedError, match="more pieces than are read"):
        put_together("w", (9, 5, 2), halves, Path("c"), Budget(17))


# --- safetensors with offsets ---


def shards(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for rank, ((at, piece), (left, column)) in enumerate(
        zip(cut(ROWS, 0, count), cut(COLUMNS, 1, count), strict=True), 1
    ):
        info = {"rows": {"saved_offsets": list(at)}, "columns": {"saved_offsets": list(left)}}
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "format": "pt"}
        save_file({"rows": piece, "columns": column}, folder / name, metadata)
    return folder


def test_safetensors_shards_make_the_whole(tmp_path: Path) -> None:
    assert_equal(read(shards(tmp_path / "s")), {"rows": ROWS, "columns": COLUMNS})


def test_a_missing_shard_in_the_middle(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(InputError, match="the shards of 1 ranks are missing: shard-00002"):
        read(folder)


def test_shards_without_offsets(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    save_file({"rows": ROWS}, folder / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="has no DCP_SHARDING_INFO"):
        read(folder)


# --- a file a rank ---


def test_a_rank_without_its_file(tmp_path: Path) -> None:
    for rank in (0, 2):
        torch.save({"alone": ALONE}, tmp_path / f"model_world_size_3_rank_{rank}.pt")
    with pytest.raises(InputError, match=r"1 of 3 ranks are missing: model_world_size_3_rank_1\.pt"):
        read(tmp_path)


def test_files_of_two_runs(tmp_path: Path) -> None:
    torch.save({"alone": ALONE}, tmp_path / "model_world_size_1_rank_0.pt")
    torch.save({"alone": ALONE}, tmp_path / "model_world_size_2_rank_0.pt")
    with pytest.raises(InputError, match="files of runs of 1, 2 ranks"):
        read(tmp_path)


def test_what_a_look_has_read_is_not_read_again(tmp_path: Path) -> None:
    """A checkpoint of a thousand tensors has as many headers, and over a network each is a request."""
    folder, headers = three(tmp_path / "c"), Headers()
    names = [path.name for path in folder.iterdir()]
    found = read_distributed(folder, names, headers)
    (folder / ".metadata").unlink()
    assert read_distributed(folder, names, headers) is found
