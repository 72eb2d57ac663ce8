"""The GGUF reader and header writer against gguf-py, byte for byte, and against llama.cpp's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from llava_convert.core.errors import InputError
from llava_convert.core.ggml_types import TYPES
from llava_convert.core.tensors import DTYPE_BITS, QUANTS, nbytes_of
from llava_convert.storage.gguf.file import GgufHeader, Typed, encode_gguf, open_gguf, read_gguf
from llava_convert.storage.gguf.values import Strings
from tests.fuzz.seeds import gguf_part

Tensors = Sequence[tuple[str, str, tuple[int, ...]]]

# What gguf-py calls the kinds.
KINDS = {
    "u8": GGUFValueType.UINT8, "i8": GGUFValueType.INT8, "u16": GGUFValueType.UINT16, "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32, "i32": GGUFValueType.INT32, "u64": GGUFValueType.UINT64, "i64": GGUFValueType.INT64,
    "f32": GGUFValueType.FLOAT32, "f64": GGUFValueType.FLOAT64, "bool": GGUFValueType.BOOL, "str": GGUFValueType.STRING,
}  # fmt: skip
METADATA = {
    "general.architecture": Typed("str", "llama"),
    "x.u8": Typed("u8", 255), "x.i8": Typed("i8", -128), "x.u16": Typed("u16", 65535), "x.i16": Typed("i16", -32768),
    "x.u32": Typed("u32", 2**32 - 1), "x.i32": Typed("i32", -(2**31)), "x.u64": Typed("u64", 2**64 - 1),
    "x.i64": Typed("i64", -(2**63)), "x.f32": Typed("f32", 0.5), "x.f64": Typed("f64", 0.1),
    "x.true": Typed("bool", True), "x.false": Typed("bool", False), "x.str": Typed("str", "Ġé\n\0 <|eot|>"),
    "x.none": Typed("str", ""),
    "x.[u8]": Typed("[u8]", (0, 255)), "x.[i8]": Typed("[i8]", (-1,)), "x.[u16]": Typed("[u16]", (1, 2, 3)),
    "x.[i16]": Typed("[i16]", (-5,)), "x.[u32]": Typed("[u32]", (7, 8)), "x.[i32]": Typed("[i32]", (-1, 23)),
    "x.[u64]": Typed("[u64]", (2**64 - 1,)), "x.[i64]": Typed("[i64]", (-(2**63),)),
    "x.[f32]": Typed("[f32]", (0.48145467042922974, -(2.0**99), float("inf"))), "x.[f64]": Typed("[f64]", (0.1, 1e300)),
    "x.[bool]": Typed("[bool]", (True, False, True)), "x.[str]": Typed("[str]", ("", "▁a", "<0x0A>", "a\0b")),
}  # fmt: skip
EVERY_TYPE = [(f"blk.{number}.weight", dtype, (3, 256)) for number, dtype in TYPES.items()]
SHAPES = [("one", "F32", (1,)), ("row", "F16", (5,)), ("cube", "BF16", (2, 3, 5)), ("four", "I8", (2, 3, 4, 7))]


def weights(dtype: str, shape: tuple[int, ...], seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes_of(dtype, prod(shape)))


def as_file(header: GgufHeader, tensors: Tensors) -> bytes:
    """The file which `header` announces: its data where it says, zeros between."""
    made = bytearray(header.data) + bytes(header.size - len(header.data))
    for seed, (name, dtype, shape) in enumerate(tensors):
        data = weights(dtype, shape, seed)
        made[header.offsets[name] : header.offsets[name] + len(data)] = data
    return bytes(made)


def writer_of(path: Path, metadata: Mapping[str, Typed], tensors: Tensors, **options: Any) -> GGUFWriter:
    """gguf-py's writer, everything given to it. Blocks are handed over as bytes, which is its own way."""
    architecture, *others = metadata.items()
    assert architecture[0] == "general.architecture"
    writer = GGUFWriter(path, architecture[1].value, **options)
    for key, typed in others:
        array = typed.kind.startswith("[")
        kind = KINDS[typed.kind.strip("[]")]
        if key == "general.alignment":
            writer.add_custom_alignment(typed.value)
        elif array:
            writer.add_key_value(key, list(typed.value), GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, typed.value, kind)
    for seed, (name, dtype, shape) in enumerate(tensors):
        raw = np.frombuffer(weights(dtype, shape, seed), np.uint8)
        if dtype in QUANTS:
            weights_in, size = QUANTS[dtype]
            raw = raw.reshape(*shape[:-1], shape[-1] // weights_in * size)
        elif dtype != "BF16":
            raw = raw.view({"F": "f", "I": "i"}[dtype[0]] + str(DTYPE_BITS[dtype] // 8)).reshape(shape)
        else:
            raw = raw.reshape(*shape[:-1], shape[-1] * 2)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[dtype])
    return writer


def by_gguf_py(path: Path, metadata: Mapping[str, Typed], tensors: Tensors, **options: Any) -> bytes:
    """Written by gguf-py; its bytes, when it is one file."""
    writer = writer_of(path, metadata, tensors, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes() if path.exists() else b""


def test_types_are_those_of_gguf_py() -> None:
    if len(gguf.GGML_QUANT_SIZES) < len(TYPES):
        pytest.skip("an older gguf-py, which lacks types")
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES} == TYPES
    assert {name: size for name, size in sizes.items() if name not in DTYPE_BITS} == QUANTS
    for dtype, (weights_in, size) in sizes.items():
        assert nbytes_of(dtype, 7 * weights_in) == 7 * size


@pytest.mark.parametrize("alignment", [32, 1, 8, 4096])
@pytest.mark.parametrize("tensors", [EVERY_TYPE, SHAPES, SHAPES[:1], []], ids=["types", "shapes", "one", "none"])
def test_written_as_gguf_py_writes(tmp_path: Path, alignment: int, tensors: Tensors) -> None:
    metadata = dict(METADATA)
    if alignment != 32:
        metadata["general.alignment"] = Typed("u32", alignment)
    theirs = by_gguf_py(tmp_path / "theirs.gguf", metadata, tensors)
    header = encode_gguf(METADATA, tensors, alignment=alignment)
    assert as_file(header, tensors) == theirs
    assert header.size == len(theirs)
    assert list(header.offsets) == [name for name, _, _ in tensors]


def test_alignment_is_told_where_the_caller_tells_it(tmp_path: Path) -> None:
    architecture, *others = METADATA.items()
    for told, alignment in ((64, 64), (64, 128), (64, 32), (32, 32)):
        metadata = dict([architecture, ("general.alignment", Typed("u32", told)), *others])
        right = metadata | {"general.alignment": Typed("u32", alignment)}
        theirs = by_gguf_py(tmp_path / "x.gguf", right, SHAPES)
        assert as_file(encode_gguf(metadata, SHAPES, alignment=alignment), SHAPES) == theirs


@pytest.mark.parametrize("alignment", [32, 256])
def test_read_as_gguf_py_wrote(tmp_path: Path, alignment: int) -> None:
    tensors = [*EVERY_TYPE, *SHAPES]
    metadata = METADATA if alignment == 32 else METADATA | {"general.alignment": Typed("u32", alignment)}
    path = tmp_path / "x.gguf"
    data = by_gguf_py(path, metadata, tensors)
    found = read_gguf(path)
    assert (found.path, found.size, found.version, found.alignment) == (path, len(data), 3, alignment)
    assert found.metadata == metadata
    assert list(found.metadata) == list(metadata)
    assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == tensors
    for seed, tensor in enumerate(found.tensors.values()):
        (extent,) = tensor.extents
        assert extent.path == path
        assert extent.length == tensor.nbytes
        assert data[extent.offset : extent.offset + extent.length] == weights(tensor.dtype, tensor.shape, seed)
    assert min(t.extents[0].offset for t in found.tensors.values()) == found.data_start


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    tensors = [*EVERY_TYPE, *SHAPES]
    path = tmp_path / "x.gguf"
    path.write_bytes(as_file(encode_gguf(METADATA, tensors), tensors))
    reader = gguf.GGUFReader(path)
    for key, typed in METADATA.items():
        value = reader.fields[key].contents()
        assert value == (list(typed.value) if typed.kind.startswith("[") else typed.value), key
        kinds = [KINDS[typed.kind.strip("[]")]]
        assert reader.fields[key].types == ([GGUFValueType.ARRAY, *kinds] if typed.kind.startswith("[") else kinds)
    assert [(t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1])) for t in reader.tensors] == tensors
    for seed, tensor in enumerate(reader.tensors):
        assert tensor.data.tobytes() == weights(*tensors[seed][1:], seed)


_LLAMA_CPP = """
import ctypes, importlib.util, json, sys
from pathlib import Path

class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

lib = ctypes.CDLL(str(next(Path(importlib.util.find_spec("xllamacpp").origin).parent.glob("*.so"))))
lib.gguf_init_from_file.restype = ctypes.c_void_p
lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
lib.gguf_get_tensor_name.restype = ctypes.c_char_p
for name in ("gguf_get_n_kv", "gguf_get_n_tensors", "gguf_get_data_offset", "gguf_get_alignment"):
    getattr(lib, name).argtypes, getattr(lib, name).restype = [ctypes.c_void_p], ctypes.c_int64
for name in ("gguf_get_tensor_name", "gguf_get_tensor_offset", "gguf_get_tensor_type", "gguf_get_tensor_size"):
    getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
lib.gguf_get_tensor_offset.restype = lib.gguf_get_tensor_size.restype = ctypes.c_size_t
for path in sys.argv[1:]:
    file = lib.gguf_init_from_file(path.encode(), Params(True, None))
    print(json.dumps(file and [lib.gguf_get_n_kv(file), lib.gguf_get_alignment(file), lib.gguf_get_data_offset(file), [
        [lib.gguf_get_tensor_name(file, i).decode(), lib.gguf_get_tensor_type(file, i),
         lib.gguf_get_tensor_offset(file, i), lib.gguf_get_tensor_size(file, i)]
        for i in range(lib.gguf_get_n_tensors(file))]]))
"""


def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's own reader is in the extra `llamacpp`")
    empty = METADATA | {f"e.{kind}": Typed(f"[{kind}]", ()) for kind in KINDS}
    # Of Q8_1, which no file holds, gguf-py tells 40 bytes and ggml 36.
    every = [tensor for tensor in EVERY_TYPE if tensor[1] != "Q8_1"] + SHAPES
    cases: list[tuple[Tensors, int]] = [(every, 32), (SHAPES, 128), ([], 32)]
    paths = []
    for number, (tensors, alignment) in enumerate(cases):
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(as_file(encode_gguf(empty, tensors, alignment=alignment), tensors))
    # In a process of its own, since the library takes the standard streams for its log.
    ran = subprocess.run([sys.executable, "-c", _LLAMA_CPP, *map(str, paths)], capture_output=True, check=True)
    for line, (tensors, alignment) in zip(ran.stdout.splitlines(), cases, strict=True):
        header = encode_gguf(empty, tensors, alignment=alignment)
        keys, aligned, data_start, infos = json.loads(line)
        assert (keys, aligned) == (len(empty) + (alignment != 32), alignment)
        assert [(name, TYPES[kind], start + data_start, size) for name, kind, start, size in infos] == [
            (name, dtype, header.offsets[name], nbytes_of(dtype, prod(shape))) for name, dtype, shape in tensors
        ]


def test_bytes_that_are_no_text_come_back_as_they_were(tmp_path: Path) -> None:
    # Converters of 2023 wrote the bytes of byte-level tokens, and gguf-py's writer takes them so.
    tokens = [b"\xff", b"\xc3", "é".encode(), b"\xed\xa0\x80", b""]
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(path).metadata
    assert [token.encode("utf-8", "surrogateescape") for token in found["tokenizer.ggml.tokens"].value] == tokens
    assert encode_gguf(found, []).data == path.read_bytes()


def test_strings_across_the_edges_of_the_buffer(tmp_path: Path) -> None:
    """Read in pieces of a MiB: strings, their lengths and numbers that lie across an end, and one that is longer."""
    words = [f"{number:06d}" * (number % 23) for number in range(40_000)]
    metadata = {
        "general.architecture": Typed("str", "x"),
        "a": Typed("[str]", tuple(words)),
        "b": Typed("str", "é" * 700_000),
        "c": Typed("[i32]", tuple(range(300_000))),
        "d": Typed("[str]", tuple(reversed(words))),
        "e": Typed("u8", 7),
    }
    path = tmp_path / "x.gguf"
    data = by_gguf_py(path, metadata, SHAPES)
    assert len(data) > 6 << 20
    found = read_gguf(path)
    assert found.metadata == metadata
    assert encode_gguf(metadata, SHAPES).data == data[: found.data_start]


def test_vocabularies_of_several_files_are_read_once(tmp_path: Path) -> None:
    """Where their bytes are the same, wherever they lie: not where one character differs, or the length."""
    words = tuple(f"{number:06d}" * (number % 23) for number in range(40_000))
    other = (*words[:-1], "another")
    kept = {"shift": Typed("str", "é" * 999), "again": Typed("[str]", words), "after": Typed("u8", 7)}
    variants: list[dict[str, Typed]] = [
        {"a": Typed("[str]", words)},
        kept,
        {"a": Typed("[str]", other), "b": Typed("[str]", words)},
        {"a": Typed("[str]", words[:-1])},
        {"a": Typed("[str]", ("x" * 7, *words[1:]))},
    ]
    known: list[Strings] = []
    for number, metadata in enumerate(variants):
        path = tmp_path / f"{number}.gguf"
        by_gguf_py(path, {"general.architecture": Typed("str", "x"), **metadata}, SHAPES)
        found = read_gguf(path, known)
        assert {name: found.metadata[name] for name in metadata} == metadata
        assert found.tensors == read_gguf(path).tensors
    assert [one.values for one in known] == [words, other, words[:-1], ("x" * 7, *words[1:])]
    again = read_gguf(tmp_path / "1.gguf", known).metadata["again"].value
    assert again is known[0].values

    path = tmp_path / "0.gguf"
    path.write_bytes(path.read_bytes()[:330_000])
    with pytest.raises(InputError, match="truncated"):
        read_gguf(path, known)


def test_files_with_one_vocabulary_share_its_bytes(tmp_path: Path) -> None:
    words, few = Typed("[str]", [f"{number}" for number in range(5000)]), Typed("[str]", ["a", "b"])
    encoded: dict[int, bytes] = {}
    first = encode_gguf({"a": words, "b": few, "c": Typed("u8", 1)}, SHAPES, encoded=encoded)
    second = encode_gguf({"name": Typed("str", "x"), "a": words, "b": few}, SHAPES[:1], encoded=encoded)
    assert first.pieces[1] is second.pieces[1]
    for header, metadata, shapes in (
        (first, {"a": words, "b": few, "c": Typed("u8", 1)}, SHAPES),
        (second, {"name": Typed("str", "x"), "a": words, "b": few}, SHAPES[:1]),
    ):
        assert header.data == encode_gguf(metadata, shapes).data
        path = tmp_path / "x.gguf"
        path.write_bytes(as_file(header, shapes))
        assert read_gguf(path).metadata["a"].value == tuple(words.value)


def test_version_2_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = by_gguf_py(path, METADATA, SHAPES)
    expected = read_gguf(path)
    path.write_bytes(data[:4] + b"\x02" + data[5:])
    assert len(gguf.GGUFReader(path).tensors) == len(SHAPES)  # as gguf-py does
    found = read_gguf(path)
    assert found.version == 2
    assert (found.metadata, found.tensors) == (expected.metadata, expected.tensors)


@pytest.mark.parametrize(
    "metadata, tensors",
    [
        ({"a": Typed("u128", 1)}, []),
        ({"a": Typed("[]", 1)}, []),
        ({"a": Typed("[[u8]]", ((1,),))}, []),
        ({"a": Typed("u8", 256)}, []),
        ({"a": Typed("u8", -1)}, []),
        ({"a": Typed("u8", 0.5)}, []),
        ({"a": Typed("f32", 1e300)}, []),
        ({"a": Typed("[i8]", (1, 200))}, []),
        ({"a": Typed("str", "\ud800")}, []),
        ({}, [("a", "F32", (1,)), ("a", "F32", (1,))]),
        ({}, [("", "F32", (1,))]),
        ({}, [("a" * 64, "F32", (1,))]),
        ({}, [("é" * 32, "F32", (1,))]),
        ({}, [("a", "F8_E4M3", (1,))]),
        ({}, [("a", "F32", (1, 1, 1, 1, 1))]),
        ({}, [("a", "Q8_0", (32, 33))]),
        ({}, [("a", "Q4_K", (256, 32))]),
        ({}, [("a", "Q8_0", ())]),
    ],
)
def test_what_the_format_cannot_say_is_refused(metadata: dict[str, Typed], tensors: Tensors) -> None:
    with pytest.raises(ValueError):
        encode_gguf(metadata, tensors)


@pytest.mark.parametrize("alignment", [0, -32, 3, 48])
def test_alignment_is_a_power_of_two(alignment: int) -> None:
    with pytest.raises(ValueError):
        encode_gguf({}, [], alignment=alignment)


def test_longest_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(as_file(encode_gguf({}, [("a" * 63, "F32", (1,))]), [("a" * 63, "F32", (1,))]))
    assert list(read_gguf(path).tensors) == ["a" * 63]


# -- splits


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The first of three parts that gguf-py's own splitter wrote."""
    by_gguf_py(tmp_path / "m.gguf", METADATA, SHAPES, split_max_tensors=2, small_first_shard=True)
    names = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    return tmp_path / names[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_split_files_are_read_by_any_part(split: Path, number: int) -> None:
    found = open_gguf(split.with_name(f"m-0000{number}-of-00003.gguf"))
    assert [path.name for path in found.files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert {k: v for k, v in found.metadata.items() if not k.startswith("split.")} == METADATA
    assert found.metadata["split.no"] == Typed("u16", 0)
    assert found.metadata["split.count"] == Typed("u16", 3)
    assert found.metadata["split.tensors.count"] == Typed("i32", 4)
    assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == SHAPES
    assert found.shard_of == dict.fromkeys(["one", "row"], "m-00002-of-00003.gguf") | dict.fromkeys(
        ["cube", "four"], "m-00003-of-00003.gguf"
    )
    for seed, tensor in enumerate(found.tensors.values()):
        (extent,) = tensor.extents
        assert extent.path.name == found.shard_of[tensor.name]
        data = extent.path.read_bytes()[extent.offset : extent.offset + extent.length]
        assert data == weights(tensor.dtype, tensor.shape, seed)


def test_parts_without_a_small_first_one(tmp_path: Path) -> None:
    by_gguf_py(tmp_path / "m.gguf", METADATA, SHAPES, split_max_size=30)
    found = open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == SHAPES
    assert set(found.shard_of.values()) == {f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)}


def test_one_file_is_its_own_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    by_gguf_py(path, METADATA | {"split.count": Typed("u16", 1)}, SHAPES)
    found = open_gguf(path)
    assert found.files == (path,)
    assert found.shard_of == dict.fromkeys(["one", "row", "cube", "four"], "m.gguf")


def test_missing_parts_are_named(split: Path) -> None:
    split.with_name("m-00002-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"1 of its 3 parts are missing: m-00002-of-00003\.gguf$"):
        open_gguf(split)


def test_a_part_under_another_name(split: Path) -> None:
    renamed = split.rename(split.with_name("model.gguf"))
    with pytest.raises(InputError, match="one of 3 parts of a model, under a name that does not say so") as caught:
        open_gguf(renamed)
    assert caught.value.hint == "give all parts their names again: NAME-00001-of-00003.gguf"


def test_parts_exchanged(split: Path) -> None:
    second, third = (split.with_name(f"m-0000{n}-of-00003.gguf") for n in (2, 3))
    held = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(held)
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf: its header does not say that it is part 2 of 3"):
        open_gguf(split)


def test_a_part_of_another_model(split: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    more = [*SHAPES[:2], ("cube2", "BF16", (2, 3, 5))]
    by_gguf_py(tmp_path / "other" / "m.gguf", METADATA, more, split_max_tensors=2, small_first_shard=True)
    (tmp_path / "other" / "m-00003-of-00003.gguf").replace(split.with_name("m-00003-of-00003.gguf"))
    with pytest.raises(InputError, match=r"says that all parts hold 4 tensors, but they hold 3"):
        open_gguf(split)


def test_the_same_tensor_in_two_parts(split: Path) -> None:
    second, third = (split.with_name(f"m-0000{n}-of-00003.gguf") for n in (2, 3))
    keyed = b"split.no\x02\0\0\0"
    third.write_bytes(second.read_bytes().replace(keyed + b"\x01\0", keyed + b"\x02\0"))
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf: tensor one is in m-00002-of-00003\.gguf too"):
        open_gguf(split)


def test_more_tensors_in_all_parts_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (tmp_path / f"x-0000{number + 1}-of-00002.gguf").write_bytes(gguf_part(number))
    assert len(open_gguf(tmp_path / "x-00001-of-00002.gguf").tensors) == 2
    monkeypatch.setattr("llava_convert.core.tensors.MAX_TENSORS", 1)
    with pytest.raises(InputError, match="2 tensors, more than 1"):
        open_gguf(tmp_path / "x-00001-of-00002.gguf")
