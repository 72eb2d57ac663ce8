"""GGUF files that are wrong, by the rows of the fault list (81-83), and the small ones that are right (86).

The files are made here from struct alone, so that nothing of the reader's own code decides what is well-formed. Rows 84
and 85 are of the conversion: `test_gguf_source_faults.py` and the tests of `verify`.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest

from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from llava_convert.storage.gguf import values as gguf_values
from llava_convert.storage.gguf.file import GgufFile, Typed, open_gguf, read_gguf
from tests.fuzz.guard import bounded

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARRAY, U64, I64, F64 = range(13)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: bytes, ne: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    dimensions = struct.pack("<I", len(ne) if n_dims is None else n_dims) + struct.pack(f"<{len(ne)}Q", *ne)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def packed(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    told = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


NAME = key(b"general.architecture", STR, text(b"llama"))
KEYS = [NAME, key(b"tokens", ARRAY, array(STR, 2, text(b"a") + text(b"bc"))), key(b"n", U32, b"\7\0\0\0")]
SOUND = packed(
    KEYS,
    [tensor(b"a", (3, 2)), tensor(b"b", (64,), kind=8, offset=32), tensor(b"c", (), kind=24, offset=128)],
    bytes(160),
)


def read(tmp_path: Path, content: bytes) -> GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def refused(tmp_path: Path, content: bytes, kind: type[ConvertError] = InputError) -> ConvertError:
    """The error for a file of this content: of the given class, of one printable line that begins with the path."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ConvertError) as caught:
        read_gguf(path)
    return _told(caught.value, path, kind)


def _told(error: ConvertError, path: Path, kind: type[ConvertError]) -> ConvertError:
    assert type(error) is kind
    assert error.exit_code == {InputError: 3, UnsupportedError: 4}[kind]
    assert error.message.startswith(f"{path}: ")
    assert error.message.isprintable()
    assert len(error.message) < 1000
    return error


@contextmanager
def small() -> Iterator[None]:
    """Fails where the body takes a second of the processor, or four MiB."""
    tracemalloc.start()
    try:
        with bounded(1.0, peak=None):
            yield
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_sound_file_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, SOUND)
    assert found.metadata == {
        "general.architecture": Typed("str", "llama"), "tokens": Typed("[str]", ("a", "bc")), "n": Typed("u32", 7),
    }  # fmt: skip
    assert [(t.dtype, t.shape, t.nbytes) for t in found.tensors.values()] == [
        ("F32", (2, 3), 24),
        ("Q8_0", (64,), 68),
        ("I8", (), 1),
    ]
    assert [t.extents[0].offset - found.data_start for t in found.tensors.values()] == [0, 32, 128]


# -- row 81


@pytest.mark.parametrize("magic", [b"PK\3\4", b"\x80\2}q", b"GGUE", b"gguf", b"FUGG", b"\0\0\0\0", b'{"a"', b"GG"])
def test_fault_81_bad_magic(tmp_path: Path, magic: bytes) -> None:
    assert "not a GGUF file" in refused(tmp_path, magic + SOUND[4:]).message


@pytest.mark.parametrize("magic, name", [(b"lmgg", "ggml"), (b"fmgg", "ggmf"), (b"tjgg", "ggjt"), (b"algg", "ggla")])
def test_fault_81_formats_before_gguf(tmp_path: Path, magic: bytes, name: str) -> None:
    assert f"format {name}, from before GGUF" in refused(tmp_path, magic + bytes(60), UnsupportedError).message


@pytest.mark.parametrize(
    "version, said",
    [
        (0, "GGUF version 0, which llama.cpp gave up"),
        (1, "GGUF version 1, which llama.cpp gave up"),
        (4, "GGUF version 4; 3 is the latest"),
        (65537, "GGUF version 65,537; 3 is the latest"),
        (3 << 24, "big-endian GGUF (version 3)"),
        (2 << 24, "big-endian GGUF (version 2)"),
    ],
)
def test_fault_81_versions(tmp_path: Path, version: int, said: str) -> None:
    assert said in refused(tmp_path, SOUND[:4] + struct.pack("<I", version) + SOUND[8:], UnsupportedError).message


def test_fault_81_big_endian_as_gguf_py_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"big-endian GGUF \(version 3\)") as caught:
        read_gguf(path)
    assert caught.value.hint == "gguf-convert-endian FILE little, of gguf-py, turns it round"


def test_fault_81_something_in_place_of_the_file(tmp_path: Path) -> None:
    assert "empty file" in refused(tmp_path, b"").message
    error = refused(tmp_path, LFS_POINTER)
    assert "Git LFS pointer" in error.message
    assert "git lfs pull" in (error.hint or "")
    assert "web page" in refused(tmp_path, b"<!DOCTYPE html>\n<html>Access denied</html>").message


def test_fault_81_no_file(tmp_path: Path) -> None:
    for place in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError) as caught:
            open_gguf(place)
        _told(caught.value, place, InputError)


# -- row 82


def test_fault_82_truncated_at_any_byte(tmp_path: Path) -> None:
    """But for the padding behind the last tensor, which some writers leave out."""
    end = len(SOUND) - 31
    for length in range(1, end):
        error = refused(tmp_path, SOUND[:length])
        assert "truncated" in error.message or "not a GGUF" in error.message, length
    for length in range(end, len(SOUND) + 1):
        assert len(read(tmp_path, SOUND[:length]).tensors) == 3


def test_fault_82_offsets(tmp_path: Path) -> None:
    def of(*offsets: int, data: int = 256) -> bytes:
        return packed([NAME], [tensor(b"ab"[i : i + 1], (8,), offset=at) for i, at in enumerate(offsets)], bytes(data))

    assert len(read(tmp_path, of(0, 32)).tensors) == 2
    assert len(read(tmp_path, of(32, 0)).tensors) == 2
    assert "tensor b: offset 40 is not a multiple of 32" in refused(tmp_path, of(0, 40)).message
    assert "tensors a and b overlap" in refused(tmp_path, of(0, 0)).message
    assert "hole of 32 bytes between a and b" in refused(tmp_path, of(0, 64)).message
    assert "hole of 32 bytes between the header and a" in refused(tmp_path, of(32, 64)).message
    assert "tensor b ends at byte" in refused(tmp_path, of(0, 32, data=63)).message
    assert "tensor b ends at byte" in refused(tmp_path, of(0, 2**64 - 32)).message
    assert "tensor b ends at byte" in refused(tmp_path, of(0, 2**63)).message


def test_fault_82_a_shape_that_was_made_smaller(tmp_path: Path) -> None:
    infos = [tensor(b"a", (8, 4)), tensor(b"b", (8,), offset=128)]
    assert len(read(tmp_path, packed([], infos, bytes(160))).tensors) == 2
    infos[0] = tensor(b"a", (8, 1))
    assert "hole of 96 bytes between a and b" in refused(tmp_path, packed([], infos, bytes(160))).message


@pytest.mark.parametrize("value", [0, 3, 24, 33, 2**32 - 1])
def test_fault_82_alignment_is_no_power_of_two(tmp_path: Path, value: int) -> None:
    keys = [key(b"general.alignment", U32, struct.pack("<I", value))]
    said = refused(tmp_path, packed(keys, [tensor(b"a", (8,))], bytes(64))).message
    assert f"general.alignment is u32 {value}, not a u32 power of two" in said


def test_fault_82_alignment_is_a_u32(tmp_path: Path) -> None:
    for kind, value in ((U64, struct.pack("<Q", 32)), (I32, struct.pack("<i", 32)), (STR, text(b"32"))):
        assert (
            "not a u32 power of two" in refused(tmp_path, packed([key(b"general.alignment", kind, value)], [])).message
        )


def test_fault_82_alignment_moves_the_data(tmp_path: Path) -> None:
    def of(alignment: int, offset: int) -> bytes:
        keys = [key(b"general.alignment", U32, struct.pack("<I", alignment))]
        return packed(keys, [tensor(b"a", (1,)), tensor(b"b", (1,), offset=offset)], bytes(260), alignment=alignment)

    for alignment, offset in ((1, 4), (2, 4), (4, 4), (8, 8), (256, 256)):
        found = read(tmp_path, of(alignment, offset))
        assert found.data_start % alignment == 0
        assert found.tensors["b"].extents[0].offset == found.data_start + offset
    assert "not a multiple of 256" in refused(tmp_path, of(256, 32)).message


# -- row 83


def test_fault_83_twice(tmp_path: Path) -> None:
    assert "key n is there twice" in refused(tmp_path, packed([*KEYS, KEYS[-1]], [])).message
    infos = [tensor(b"a", (8,)), tensor(b"a", (8,), offset=32)]
    assert "tensor a is there twice" in refused(tmp_path, packed([], infos, bytes(64))).message


@pytest.mark.parametrize("n_dims", [5, 2**32 - 1])
def test_fault_83_dimensions(tmp_path: Path, n_dims: int) -> None:
    content = packed([], [tensor(b"a", (1, 1, 1, 1), n_dims=n_dims)], bytes(99))
    assert f"tensor a has {n_dims:,} dimensions, GGUF knows 4" in refused(tmp_path, content).message


@pytest.mark.parametrize(
    "ne",
    [
        (2**32, 2**32), (2**63,), (2**64 - 1,), (2**16,) * 4, (2**62, 4, 0), (0, 2**64 - 1), (2**21, 2**21, 2**21, 2),
    ],
)  # fmt: skip
def test_fault_83_products_overflow(tmp_path: Path, ne: tuple[int, ...]) -> None:
    assert "overflows" in refused(tmp_path, packed([], [tensor(b"a", ne)], bytes(64))).message


def test_fault_83_more_than_the_file(tmp_path: Path) -> None:
    content = packed([], [tensor(b"a", (2**40,))], bytes(64))
    assert "tensor a ends at byte 4,398,046,511,168 of a file of 128" in refused(tmp_path, content).message


@pytest.mark.parametrize("length", [7, 2**20, 2**40, 2**63, 2**64 - 1])
def test_fault_83_lengths_of_strings_and_arrays(tmp_path: Path, length: int) -> None:
    wrong = [
        packed([key(b"k", STR, text(b"abc", length))], [])[:48],
        packed([text(b"k", max(length, 100))], [], counts=(0, 1)),
        packed([], [text(b"a", max(length, 100))], counts=(1, 0)),
        packed([key(b"k", ARRAY, array(STR, length, text(b"a") * 3))], [])[:60],
        packed([key(b"k", ARRAY, array(STR, 1, text(b"a", length)))], [])[:58],
        *(
            packed([key(b"k", ARRAY, array(kind, length, bytes(3)))], [])[:52]
            for kind in (U8, BOOL, I16, F32, U64, F64)
        ),
    ]
    for content in wrong:
        with small():
            refused(tmp_path, content)


@pytest.mark.parametrize("count", [2**40, 2**63, 2**64 - 1, 100])
def test_fault_83_numbers_of_tensors_and_keys(tmp_path: Path, count: int) -> None:
    for counts, what in (((count, 0), "tensors"), ((0, count), "keys")):
        with small():
            said = refused(tmp_path, packed([], [], bytes(64), counts=counts)).message
        assert f"{count:,} {what} announced" in said


@pytest.mark.parametrize("counts", [(2**40, 0), (0, 2**40), (2**20 + 1, 0), (0, 2**20 + 1)])
def test_fault_83_numbers_that_a_huge_file_would_have_room_for(tmp_path: Path, counts: tuple[int, int]) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as stream:
        stream.write(packed([], [], counts=counts))
        stream.truncate(2**42)  # zeros, of which the disk keeps nothing
    with small(), pytest.raises(InputError, match=r"(tensors|keys) announced"):
        read_gguf(path)


@pytest.mark.parametrize("value", [key(b"k", STR, text(b"", 2**40)), key(b"k", ARRAY, array(U8, 2**40))])
def test_fault_83_a_header_is_no_model(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as stream:
        stream.write(packed([value], []))
        stream.truncate(2**42)
    with small(), pytest.raises(InputError, match="a header of more than 134,217,728, which no model has"):
        read_gguf(path)


def test_fault_83_a_list_of_many_empty_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "_PIECE", 1 << 14)
    monkeypatch.setattr(gguf_values, "MAX_HEADER_BYTES", 1 << 17)
    path = tmp_path / "model.gguf"
    with path.open("wb") as stream:
        stream.write(packed([key(b"k", ARRAY, array(STR, 2**38))], []))
        stream.truncate(2**42)
    with small(), pytest.raises(InputError, match="a header of more than 131,072"):
        read_gguf(path)


def test_fault_83_arrays_of_arrays(tmp_path: Path) -> None:
    inner = array(U8, 1, b"\1")
    for _ in range(5000):
        inner = array(ARRAY, 1, inner)
    for value in (array(ARRAY, 1, array(U8, 1, b"\1")), inner):
        content = packed([key(b"k", ARRAY, value)], [])
        assert "key k is an array of arrays" in refused(tmp_path, content, UnsupportedError).message


@pytest.mark.parametrize("kind", [13, 255, 2**31, 2**32 - 1])
def test_fault_83_unknown_types(tmp_path: Path, kind: int) -> None:
    said = refused(tmp_path, packed([key(b"k", kind, bytes(99))], []), UnsupportedError).message
    assert f"key k has a value of the unknown type {kind}" in said
    content = packed([key(b"k", ARRAY, array(kind, 1, bytes(99)))], [])
    assert f"key k has a value of the unknown type {kind}" in refused(tmp_path, content, UnsupportedError).message


@pytest.mark.parametrize("kind, said", [
    (4, "Q4_2, a type that llama.cpp gave up"), (31, "Q4_0_4_4, a type that llama.cpp gave up"),
    (38, "IQ4_NL_8_8, a type that llama.cpp gave up"), (43, "the unknown type 43"),
    (2**32 - 1, "the unknown type 4,294,967,295"),
])  # fmt: skip
def test_fault_83_unknown_types_of_tensors(tmp_path: Path, kind: int, said: str) -> None:
    content = packed([], [tensor(b"a", (256,), kind=kind)], bytes(999))
    assert f"tensor a is of {said}" in refused(tmp_path, content, UnsupportedError).message


@pytest.mark.parametrize("ne, kind", [((31,), 8), ((33, 32), 8), ((16, 2), 2), ((128, 2), 12), ((), 8), ((1,), 14)])
def test_fault_83_rows_that_are_no_whole_blocks(tmp_path: Path, ne: tuple[int, ...], kind: int) -> None:
    content = packed([], [tensor(b"a", ne, kind=kind)], bytes(9999))
    assert f"tensor a: rows of {ne[0] if ne else 1} are not whole blocks" in refused(tmp_path, content).message


@pytest.mark.parametrize("name", [b"", b"\x1b[2J", b"a\nb", b"a\0", b"\xff", b"\xed\xa0\x80", "\u202e".encode()])
def test_fault_83_names_that_do_harm(tmp_path: Path, name: bytes) -> None:
    refused(tmp_path, packed([key(name, U8, b"\1")], []))
    if name != "\u202e".encode():
        refused(tmp_path, packed([], [tensor(name, (8,))], bytes(32)))


@pytest.mark.parametrize("name", [b"../../etc/passwd", b"a" * 1025])
def test_fault_83_names_of_tensors_that_no_model_has(tmp_path: Path, name: bytes) -> None:
    refused(tmp_path, packed([], [tensor(name, (8,))], bytes(32)))


# -- row 86


def test_fault_86_smallest_files_are_read(tmp_path: Path) -> None:
    nothing = read(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert (nothing.metadata, nothing.tensors) == ({}, {})
    assert read(tmp_path, packed([NAME], [])).metadata == {"general.architecture": Typed("str", "llama")}
    unpadded = packed([NAME], [], alignment=1)
    assert read(tmp_path, unpadded).data_start == len(unpadded)


@pytest.mark.parametrize("kind", [U8, I8, U16, I16, U32, I32, F32, BOOL, STR, U64, I64, F64])
def test_fault_86_empty_arrays_are_read(tmp_path: Path, kind: int) -> None:
    (typed,) = read(tmp_path, packed([key(b"k", ARRAY, array(kind, 0))], [])).metadata.values()
    assert typed.kind == f"[{gguf_values.KINDS[kind]}]"
    assert typed.value == ()


def test_fault_86_one_element_is_read(tmp_path: Path) -> None:
    keys = [key(b"a", ARRAY, array(U8, 1, b"\xfe")), key(b"b", U8, b"\xfe"), key(b"c", ARRAY, array(STR, 1, text(b"")))]
    found = read(tmp_path, packed(keys, [], alignment=1))
    assert found.metadata == {"a": Typed("[u8]", (254,)), "b": Typed("u8", 254), "c": Typed("[str]", ("",))}


@pytest.mark.parametrize("kind, dtype, ne, nbytes", [
    (24, "I8", (1,), 1), (24, "I8", (), 1), (0, "F32", (1, 1, 1, 1), 4), (8, "Q8_0", (32,), 34), (0, "F32", (0,), 0),
    (12, "Q4_K", (256, 0), 0), (28, "F64", (1,), 8), (27, "I64", (1,), 8), (41, "Q1_0", (128,), 18),
])  # fmt: skip
def test_fault_86_one_small_tensor_is_read(
    tmp_path: Path, kind: int, dtype: str, ne: tuple[int, ...], nbytes: int
) -> None:
    (found,) = read(tmp_path, packed([], [tensor(b"a", ne, kind=kind)], bytes(nbytes))).tensors.values()
    assert (found.dtype, found.shape, found.nbytes) == (dtype, ne[::-1], nbytes)
    assert found.extents[0].length == nbytes


def test_fault_86_odd_and_yet_right(tmp_path: Path) -> None:
    """What llama.cpp and gguf-py read too: any text as a value, any byte as true, bytes behind the last tensor."""
    keys = [key(b"k", STR, text(b"\0\xff\n")), key(b"t", BOOL, b"\2"), key(b"f", ARRAY, array(BOOL, 3, b"\0\1\xff"))]
    found = read(tmp_path, packed(keys, [tensor(b"a", (8,))], bytes(32) + b"more"))
    assert found.metadata["k"].value.encode("utf-8", "surrogateescape") == b"\0\xff\n"
    assert found.metadata["t"] == Typed("bool", True)
    assert found.metadata["f"] == Typed("[bool]", (False, True, True))
