"""The file that is written without torch is one that torch reads: every dtype, shapes of every rank, by map too."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from llava_convert.core.errors import UnsupportedError
from llava_convert.storage.torch.file import read_torch, state_dict
from llava_convert.storage.torch.write import Info, encode_torch, torch_size

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
    return infos, encode_torch(infos, data)


def test_torch_loads_it(tmp_path: Path) -> None:
    state = tensors()
    infos, made = encoded(state)
    assert torch_size(infos) == len(made)
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
    assert torch.load(io.BytesIO(encode_torch([], {})), weights_only=True) == {}
    with pytest.raises(UnsupportedError, match="w is Q4_K"):
        torch_size([("w", "Q4_K", (256,))])
