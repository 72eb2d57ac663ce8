"""The file that is written without torch is one that torch reads: every dtype, shapes of every rank, by map too."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_convert.core.errors import UnsupportedError
from llava_convert.storage.torch.file import read_torch, state_dict
from llava_convert.storage.torch.write import Info, plan_torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SHAPES = ((), (1,), (3,), (5, 7), (2, 3, 4), (0, 4), (1, 1, 1, 1), (300, 257))


def tensors() -> dict[str, torch.Tensor]:
    found = {}
    for dtype, kind in DTYPES.items():
        for shape in SHAPES:
            found[f"{dtype}.{'x'.join(map(str, shape))}.gewicht-ß"] = (torch.randn(shape) * 100).to(kind)
    return found


def encoded(state: dict[str, torch.Tensor]) -> tuple[list[Info], bytes]:
    infos = [(name, name.partition(".")[0], tuple(t.shape)) for name, t in state.items()]
    data = {name: bytes(t.reshape(-1).view(torch.uint8).numpy()) if t.numel() else b"" for name, t in state.items()}
    return infos, filled(infos, data)


def filled(infos: list[Info], data: dict[str, bytes], *more: Any) -> bytes:
    """The whole file: what is planned, the tensors' bytes, and their CRC-32s."""
    made = plan_torch(infos, *more)
    file = bytearray(made.size)
    for at, piece in (*made.pieces, *((made.offsets[name], content) for name, content in data.items())):
        file[at : at + len(piece)] = piece
    for name, places in made.checks.items():
        for at in places:
            file[at : at + 4] = zlib.crc32(data[name]).to_bytes(4, "little")
    return bytes(file)


def test_torch_loads_it(tmp_path: Path) -> None:
    state = tensors()
    _, made = encoded(state)
    (tmp_path / "x.bin").write_bytes(made)
    for found in (
        torch.load(io.BytesIO(made), weights_only=True),
        torch.load(tmp_path / "x.bin", weights_only=True, mmap=True),
    ):
        assert list(found) == list(state)
        for name, wanted in state.items():
            assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
            assert found[name].is_contiguous() and torch.equal(found[name], wanted), name
    assert list(state_dict(read_torch(tmp_path / "x.bin")).tensors) == list(state)


def test_it_is_a_sound_zip_and_the_same_each_time() -> None:
    _, made = encoded(tensors())
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                start = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
                assert start % 64 == 0, entry.filename
    torch.manual_seed(7)
    one = encoded({"F32.a": torch.randn(3, 3)})[1]
    torch.manual_seed(7)
    assert encoded({"F32.a": torch.randn(3, 3)})[1] == one


def test_nothing_and_what_torch_cannot_hold() -> None:
    assert torch.load(io.BytesIO(filled([], {})), weights_only=True) == {}
    with pytest.raises(UnsupportedError, match="w is Q4_K"):
        plan_torch([("w", "Q4_K", (256,))])
    with pytest.raises(TypeError, match="set has no place"):
        plan_torch([], {"meta": {1}}, "state_dict")


def test_a_state_dict_beside_plain_values() -> None:
    meta = {
        "cfg": "model = dict()\n",
        "epoch": 0,
        "iter": -7,
        "rate": 1.5,
        "seen": None,
        "done": True,
        "all": ["ß", {}],
    }
    state = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
    data = {"w": bytes(state["w"].reshape(-1).view(torch.uint8).numpy())}
    found = torch.load(
        io.BytesIO(filled([("w", "F32", (2, 3))], data, {"meta": meta}, "state_dict")), weights_only=True
    )
    assert found["meta"] == meta and list(found) == ["meta", "state_dict"]
    assert torch.equal(found["state_dict"]["w"], state["w"])


def test_tensors_behind_the_first_4_gib(tmp_path: Path) -> None:
    """A sparse file, so that only what is written takes room."""
    infos: list[Info] = [("large", "F16", (5 << 29,)), ("behind", "F32", (3,)), ("last", "I8", (2,))]
    made = plan_torch(infos)
    assert made.size > 5 << 30
    path = tmp_path / "x.pth"
    with path.open("wb") as stream:
        stream.truncate(made.size)
        for at, piece in (*made.pieces, (made.offsets["behind"], struct.pack("<3f", 1, 2, 3))):
            stream.seek(at)
            stream.write(piece)
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["behind"].tolist() == [1, 2, 3] and found["large"].shape == (5 << 29,)
    assert {name: t.extents[0].offset for name, t in state_dict(read_torch(path)).tensors.items()} == made.offsets
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == 5 << 30
