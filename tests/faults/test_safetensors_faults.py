"""Safetensors files that are wrong, by the rows of the fault list (1-20, 32), and JSON files that are (30).

Row 21 (NaN and infinities are counted) belongs to what reads weights: a header does not show them. That row 12's
arithmetic on F8 is refused belongs to the ops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import printable
from llava_convert.storage.files import open_regular, require_regular
from llava_convert.storage.json_files import MAX_JSON_VALUES, read_json
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.weights import open_weights, reject_ungathered

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SOUND = packed({"a": entry("F32", [2], 0, 8), "b": entry("F16", [2], 8, 12)}, bytes(12))


def refused(tmp_path: Path, content: bytes, kind: type[ConvertError] = InputError) -> ConvertError:
    """The error for a file of this content: of the given class, of one printable line that begins with the path."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConvertError) as caught:
        read_header(path)
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == {InputError: 3, UnsupportedError: 4}[kind]
    assert error.message.startswith(f"{path}: ")
    assert error.message.isprintable()
    assert len(error.message) < 1000
    assert path.read_bytes() == content
    return error


@contextmanager
def within(seconds: float, peak_bytes: int | None = None) -> Iterator[None]:
    """Fails, rather than hangs, when the body takes longer; or more memory."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if peak_bytes is not None:
        tracemalloc.start()
    try:
        yield
        assert peak_bytes is None or tracemalloc.get_traced_memory()[1] < peak_bytes
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    assert list(read_header(path).tensors) == ["a", "b"]


def test_fault_01_zero_bytes(tmp_path: Path) -> None:
    assert "empty file" in refused(tmp_path, b"").message


@pytest.mark.parametrize("length", range(1, 8))
def test_fault_02_fewer_bytes_than_the_length_field(tmp_path: Path, length: int) -> None:
    assert f"truncated: {length} bytes" in refused(tmp_path, SOUND[:length]).message


@pytest.mark.parametrize("length", [8, 9, 40])
def test_fault_03_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    error = refused(tmp_path, SOUND[:length])
    assert f"truncated: a header of {len(SOUND) - 20} bytes in a file of {length}" in error.message
    assert error.hint is not None


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**63, 2**64 - 1])
def test_fault_04_header_too_large(tmp_path: Path, length: int) -> None:
    with within(1, peak_bytes=1 << 20):
        error = refused(tmp_path, length.to_bytes(8, "little") + bytes(100))
    assert f"header has {length:,} bytes" in error.message


def test_fault_04_header_of_endless_values(tmp_path: Path) -> None:
    """Within the size, but it would take gigabytes once parsed."""
    text = b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(text))
    with within(20, peak_bytes=100 << 20), pytest.raises(InputError, match="more than 5,000,000 values"):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "not JSON"),
        (b"{", "line 1 column 2"),
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b'{"a\xff":1}', "invalid UTF-8 at line 1 column 4"),
        (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
        (b'{"a":NaN}', "NaN at line 1 column 6"),
        (b'{"a":1}\x00\x00\x00', "not JSON"),
        (b'{"a\nb":1}', "not JSON"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not JSON that a model needs"),
        (b'{"a":1}', "tensor a: not an object"),
        (b'{"a":{}}', "tensor a: has no dtype"),
        (b'{"__metadata__":{"format":1},"a":1}', "__metadata__ is not an object of strings"),
        (b'{"__metadata__":[],"a":1}', "__metadata__ is not an object of strings"),
    ],
)
def test_fault_05_header_is_not_json(tmp_path: Path, text: bytes, fragment: str) -> None:
    assert fragment in refused(tmp_path, packed(text, bytes(16))).message


@pytest.mark.parametrize("cut", [1, 4, 11, 12])
def test_fault_06_data_truncated(tmp_path: Path, cut: int) -> None:
    error = refused(tmp_path, SOUND[:-cut])
    assert f"incomplete download? {len(SOUND) - cut} of {len(SOUND)} bytes" in error.message


@pytest.mark.parametrize("extra", [b"\0", b" ", bytes(4096)])
def test_fault_07_trailing_bytes(tmp_path: Path, extra: bytes) -> None:
    assert f"{len(extra):,} trailing bytes" in refused(tmp_path, SOUND + extra).message


@pytest.mark.parametrize("ends", [(4, 12), (0, 8), (2, 10)])
def test_fault_08_overlap(tmp_path: Path, ends: tuple[int, int]) -> None:
    header = {"first": entry("F32", [2], 0, 8), "second": entry("F32", [2], *ends)}
    assert "tensors first and second overlap" in refused(tmp_path, packed(header, bytes(12))).message


def test_fault_08_empty_tensor_within_another(tmp_path: Path) -> None:
    header = {"first": entry("F32", [2], 0, 8), "second": entry("F32", [0], 4, 4)}
    assert "tensors first and second overlap" in refused(tmp_path, packed(header, bytes(8))).message


def test_fault_09_hole(tmp_path: Path) -> None:
    header = {"first": entry("F32", [2], 0, 8), "second": entry("F32", [2], 12, 20)}
    assert "hole of 4 bytes between first and second" in refused(tmp_path, packed(header, bytes(20))).message
    header = {"first": entry("F32", [2], 4, 12)}
    assert "hole of 4 bytes between the header and first" in refused(tmp_path, packed(header, bytes(12))).message


@pytest.mark.parametrize(
    ("dtype", "shape", "end"), [("F32", [3], 8), ("F16", [2, 2], 16), ("U8", [], 0), ("I64", [0], 8)]
)
def test_fault_10_shape_and_span_differ(tmp_path: Path, dtype: str, shape: list[int], end: int) -> None:
    error = refused(tmp_path, packed({"model.norm.weight": entry(dtype, shape, 0, end)}, bytes(end)))
    assert "tensor model.norm.weight" in error.message
    assert f"but {end} are stored" in error.message


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        ([2**32, 2**32], "overflows"),
        ([2**61, 8], "overflows"),
        ([2**40, 2**40, 0], "overflows"),
        ([2**64], "not a list of sizes"),
        ([-2], "not a list of sizes"),
        ([-2, -1], "not a list of sizes"),
        ([2.0], "not a list of sizes"),
        (["2"], "not a list of sizes"),
        ([True, 2], "not a list of sizes"),
        ([[2]], "not a list of sizes"),
        (None, "not a list of sizes"),
        ("2", "not a list of sizes"),
        ([2**65] * 100_000, "not a list of sizes"),
    ],
)
def test_fault_11_impossible_shape(tmp_path: Path, shape: object, fragment: str) -> None:
    error = refused(tmp_path, packed({"a.weight": entry("F32", shape, 0, 8)}, bytes(8)))
    assert "tensor a.weight: shape" in error.message
    assert fragment in error.message


@pytest.mark.parametrize(
    "ends", [[8, 0], [-8, 0], [0.0, 8], [0, True], [0], [0, 4, 8], None, "08", {"0": 8}, [0, 2**64]]
)
def test_fault_11_impossible_offsets(tmp_path: Path, ends: object) -> None:
    header = {"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": ends}}
    assert "tensor a.weight: data_offsets" in refused(tmp_path, packed(header, bytes(8))).message


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "I4", "F128", "f32", "", "X\n\x1b[31m"])
def test_fault_12_unknown_dtype(tmp_path: Path, dtype: str) -> None:
    error = refused(tmp_path, packed({"a.weight": entry(dtype, [2], 0, 1)}, b"\0"), UnsupportedError)
    assert f"tensor a.weight: dtype {printable(dtype)} is not supported" in error.message


@pytest.mark.parametrize("dtype", [7, None, ["F32"]])
def test_fault_12_dtype_is_no_word(tmp_path: Path, dtype: object) -> None:
    assert "has no dtype" in refused(tmp_path, packed({"a": entry(dtype, [2], 0, 8)}, bytes(8))).message


def test_fault_13_name_twice(tmp_path: Path) -> None:
    """Also where the library takes it: the same place, said twice."""
    one = json.dumps(entry("F32", [2], 0, 8))
    text = f'{{"a.weight":{one},"a.weight":{one}}}'.encode()
    assert "key a.weight is there twice" in refused(tmp_path, packed(text, bytes(8))).message


# Row 14 is in test_index_faults.py.


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("a\0b", "a\\x00b"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x85", "a\\x85"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("model..weight", "model..weight"),
        ("\ud800", "\\ud800"),
        ("", "''"),
        ("x" * 10_240, "(10240 characters)"),
    ],
)
def test_fault_15_bad_name(tmp_path: Path, name: str, printed: str) -> None:
    error = refused(tmp_path, packed({name: entry("U8", [1], 0, 1)}, b"\0"))
    assert "tensor name" in error.message
    assert printed in error.message


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_fault_16_no_tensors(tmp_path: Path, header: dict[str, object]) -> None:
    assert "holds no tensors" in refused(tmp_path, packed(header)).message


def test_fault_17_tensor_without_elements(tmp_path: Path) -> None:
    header = {"model.norm.weight": entry("BF16", [0], 0, 0), "lm_head.weight": entry("BF16", [1], 0, 2)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(header, bytes(2)))
    assert read_header(path).tensors["model.norm.weight"].nbytes == 0
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=r"1 tensors hold no data: model\.norm\.weight: a ZeRO-3 shard") as caught:
            open_weights(source)
        assert caught.value.hint is not None and "stage3_gather_16bit_weights_on_model_save" in caught.value.hint


def test_fault_17_other_empty_tensors_pass() -> None:
    reject_ungathered("here", [StoredTensor("a", "F32", (0, 4), ()), StoredTensor("b", "I64", (0,), ())])


def test_fault_18_scalar_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"logit_scale": entry("F32", [], 0, 4)}, bytes(4)))
    assert read_header(path).tensors["logit_scale"].shape == ()


def test_fault_19_git_lfs_pointer(tmp_path: Path) -> None:
    error = refused(tmp_path, LFS_POINTER)
    assert "Git LFS pointer" in error.message
    assert error.hint is not None and "git lfs pull" in error.hint


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>\n<html><body>404</body></html>",
        b"\n\n  <html lang=en>",
        b"\xef\xbb\xbf<html>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        b"<Error><Code>NoSuchKey</Code></Error>",
        b'{"error":"Repository not found"}',
        b'[{"code": 404}]',
        b"Entry not found",
        b"Invalid credentials in Authorization header",
    ],
)
def test_fault_20_web_page(tmp_path: Path, page: bytes) -> None:
    error = refused(tmp_path, page)
    assert "looks like a web page" in error.message
    assert error.hint is not None


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"PK\x03\x04\x00\x00\x08\x08", "a torch (zip) checkpoint"), (b"GGUF\x03\0\0\0", "a GGUF file")],
)
def test_fault_20_another_format(tmp_path: Path, start: bytes, kind: str) -> None:
    assert f"is {kind}, not a safetensors file" in refused(tmp_path, start + bytes(64)).message


# Rows 22-29 are in test_index_faults.py.


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b'{"a": 1,}', "trailing comma at line 1 column 8"),
        (b'{\n  "a": 1,\n}\n', "trailing comma at line 2 column 9"),
        (b'{"a": [1, 2, ]}', "trailing comma at line 1 column 12"),
        (b'{"a": [1,\n\n 2,\n ]\n}', "trailing comma at line 3 column 3"),
        (b'{"a" 1}', "Expecting ':' delimiter at line 1 column 6"),
        (b'{"a": 1', "at line 1 column 8"),
        (b'{\n "a": "NaN",\n "b": NaN}', "NaN at line 3 column 7"),
        (b'{"a\\"NaN": -Infinity}', "-Infinity at line 1 column 12"),
        (b"\xef\xbb\xbf{}", "byte order mark at line 1 column 1"),
        ('{"a": 1}'.encode("utf-16"), "byte order mark at line 1 column 1"),
        ('{"é":\n "é\udcff"}'.encode("utf-8", "surrogateescape"), "invalid UTF-8 at line 2 column 4"),
        (b"", "empty file"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 10_000, "not JSON that a model needs"),
        (LFS_POINTER, "Git LFS pointer"),
        (b"<html>", "looks like a web page"),
    ],
)
def test_fault_30_json_with_a_place(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert fragment in caught.value.message


def test_fault_30_missing_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "config.json")


def test_fault_30_json_too_large(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'"' + b"x" * 98 + b'"')
    assert read_json(path, limit=100) == "x" * 98
    with pytest.raises(InputError, match="larger than 99 bytes"):
        read_json(path, limit=99)
    path.write_bytes(b"[" + b"1," * MAX_JSON_VALUES + b"1]")
    with pytest.raises(InputError, match="more than 5,000,000 values"):
        read_json(path)


def test_fault_30_key_twice_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"b": {"a": 1, "a": 2}}')
    assert read_json(path) == {"b": {"a": 2}}
    with pytest.raises(InputError, match="key a is there twice"):
        read_json(path, unique_keys=True)


def test_fault_30_sound_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(' \r\n{"é": [1.5e3, -0, null, true, "\\ud83d\\ude00", {}, "Infinity"]}\n'.encode())
    assert read_json(path) == {"é": [1500.0, 0, None, True, "\U0001f600", {}, "Infinity"]}


@pytest.mark.parametrize("read", [read_header, read_json, open_weights, open_regular, require_regular])
def test_fault_32_no_regular_file(tmp_path: Path, read: Any) -> None:
    fifo, folder, listening, device = tmp_path / "fifo", tmp_path / "folder", tmp_path / "socket", Path("/dev/zero")
    os.mkfifo(fifo)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        begun = time.process_time()
        cases = {fifo: "a pipe", listening: "a device or socket", device: "a device or socket"}
        if read is not open_weights:
            cases[folder] = "a folder"
        with within(5):
            for path, kind in cases.items():
                with pytest.raises(InputError, match=f"is {kind} where a file is expected") as caught:
                    read(path)
                assert caught.value.exit_code == 3
        assert time.process_time() - begun < 5


def test_fault_32_exchanged_for_a_fifo_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look, at what was really opened; and opening it does not wait for a writer."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    real_open = os.open

    def exchange(name: Any, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real_open(name, flags)

    monkeypatch.setattr(os, "open", exchange)
    with within(5), pytest.raises(InputError, match="is a pipe"):
        read_header(path)


@pytest.mark.parametrize("read", [read_header, read_json, open_weights])
def test_fault_32_not_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    path.chmod(0)

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    if os.access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read(path)


@pytest.mark.parametrize("name", ["with space", "üñí.safetensors", "new\nline", "x" * 250])
def test_fault_33_names_of_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SOUND)
    assert len(read_header(path).tensors) == 2


@pytest.mark.parametrize("name", ["nul\0", "x" * 300])
def test_fault_33_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / name)


def test_fault_33_links(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="a link to a file that does not exist"):
        read_header(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "loop")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        refused(tmp_path, SOUND[:length])


def test_every_changed_byte_of_the_header_is_read_or_refused(tmp_path: Path) -> None:
    """Nothing but the package's own errors comes out, whatever is in the header."""
    path = tmp_path / "model.safetensors"
    for position in range(len(SOUND) - 12):
        for value in (0x00, 0x22, 0x2C, 0x39, 0x7B, 0xFF):
            path.write_bytes(SOUND[:position] + bytes([value]) + SOUND[position + 1 :])
            try:
                read_header(path)
            except ConvertError as error:
                assert error.exit_code in (3, 4)
