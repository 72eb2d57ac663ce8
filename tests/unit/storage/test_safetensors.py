"""The safetensors reader and header writer against the safetensors library, byte for byte."""

from __future__ import annotations

import ctypes
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import DTYPE_BITS
from llava_convert.storage import safetensors as ours
from llava_convert.storage.safetensors import PAGE, Header, encode_header, read_header

Tensors = list[tuple[str, str, tuple[int, ...]]]

# What the library's writer calls the dtypes.
LIBRARY_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

PLAIN_NAME = st.from_regex(r"[a-zA-Z_]{1,6}(\.[a-z0-9_]{1,4}){0,3}", fullmatch=True)
ODD_NAME = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
NAMES = (PLAIN_NAME | ODD_NAME).filter(lambda name: ".." not in name and name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPE_BITS)), SHAPES), min_size=1, max_size=12, unique_by=lambda t: t[0]
)

# No deadline: the machines that run this are shared. One folder serves all examples of a test.
RANDOM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data_of(tensors: Tensors) -> dict[str, bytes]:
    """Data of the right length which differ between tensors."""
    data = {}
    for seed, (name, dtype, shape) in enumerate(tensors):
        length = prod(shape) * DTYPE_BITS[dtype] // 8
        data[name] = bytes((seed * 31 + i * 7) % 251 for i in range(length))
    return data


def library_file(tensors: Tensors, metadata: dict[str, str] | None) -> bytes:
    """What the real library writes for them."""
    data = data_of(tensors)
    buffers = {name: ctypes.create_string_buffer(content, len(content) or 1) for name, content in data.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=LIBRARY_NAMES[dtype],
            shape=list(shape),
            data_ptr=ctypes.addressof(buffers[name]),
            data_len=len(data[name]),
        )
        for name, dtype, shape in tensors
    }
    return bytes(safetensors.serialize(specs, metadata))


def our_file(header: Header, tensors: Tensors) -> bytes:
    data = data_of(tensors)
    content = bytearray(header.data)
    for name in header.order:
        assert header.offsets[name] == len(content), "tensors follow each other in `order`"
        content += data[name]
    return bytes(content)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int, **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


@RANDOM
@given(tensors=TENSORS, metadata=st.sampled_from([None, {"format": "pt"}, {}]))
@example(tensors=[(dtype.lower(), dtype, (3,)) for dtype in sorted(DTYPE_BITS)], metadata={"format": "pt"})
@example(tensors=[("\uffff", "F32", (1,)), ("\U0001f600", "F32", (1,)), ('a"\\/é', "F32", ())], metadata=None)
def test_header_is_that_of_the_library(tensors: Tensors, metadata: dict[str, str] | None) -> None:
    header = encode_header(tensors, metadata=metadata)
    content = our_file(header, tensors)
    assert content == library_file(tensors, metadata)
    assert header.size == len(content)


@RANDOM
@given(tensors=TENSORS)
def test_reads_what_the_library_writes(tensors: Tensors, tmp_path: Path) -> None:
    content = library_file(tensors, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    file = read_header(path)
    data = data_of(tensors)
    assert file.size == len(content)
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == {name for name, _, _ in tensors}
    for name, dtype, shape in tensors:
        tensor = file.tensors[name]
        (extent,) = tensor.extents
        assert (tensor.name, tensor.dtype, tensor.shape, tensor.strides) == (name, dtype, shape, None)
        assert extent.path == path
        assert content[extent.offset : extent.offset + extent.length] == data[name]


@RANDOM
@given(tensors=TENSORS, words=st.integers(0, PAGE // 8 - 1))
def test_data_start_where_it_is_asked_for(tensors: Tensors, words: int) -> None:
    header = encode_header(tensors, data_start_mod=words * 8)
    plain = encode_header(tensors)
    assert len(header.data) % PAGE == words * 8
    assert 0 <= len(header.data) - len(plain.data) < PAGE
    assert header.data[8:].rstrip(b" ") == plain.data[8:].rstrip(b" ")
    # The library takes the padding, and finds the same tensors.
    read = {name: bytes(found["data"]) for name, found in safetensors.deserialize(our_file(header, tensors))}
    assert read == data_of(tensors)


@pytest.mark.parametrize("mod", [1, 4, 4096, -8, 4100])
def test_data_start_must_be_possible(mod: int) -> None:
    with pytest.raises(ValueError, match="data_start_mod"):
        encode_header([("a", "F32", (1,))], data_start_mod=mod)


def test_order_of_the_input_does_not_matter() -> None:
    tensors: Tensors = [("b", "F32", (2,)), ("a", "F16", (1,)), ("c", "I64", ())]
    header = encode_header(tensors)
    assert header == encode_header(tensors[::-1])
    assert header.order == ["c", "b", "a"]
    start = len(header.data)
    assert header.offsets == {"c": start, "b": start + 8, "a": start + 16}
    assert header.size == start + 18


def test_metadata_are_sorted() -> None:
    one = encode_header([("a", "U8", (1,))], metadata={"x": "1", "a": "2"}).data
    assert one == encode_header([("a", "U8", (1,))], metadata={"a": "2", "x": "1"}).data
    assert one[8:].startswith(b'{"__metadata__":{"a":"2","x":"1"},')


def test_the_exact_bytes() -> None:
    assert encode_header([("a", "F32", (1,))]).data == (
        b'X\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   '
    )


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "F32", (1,)), ("a", "F16", (1,))],
        [("__metadata__", "F32", (1,))],
        [("a", "F4", (2,))],
    ],
)
def test_the_callers_mistakes(tensors: Tensors) -> None:
    with pytest.raises(ValueError):
        encode_header(tensors)


def test_a_header_that_no_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 64)
    with pytest.raises(UnsupportedError, match="safetensors readers take"):
        encode_header([("a" * 40, "F32", (1,))])


def test_write_order_is_of_all_dtypes() -> None:
    assert set(ours._WRITE_ORDER) == set(DTYPE_BITS)


# Guards against refusing what is sound.


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "empty_last": entry("F32", [0], 4, 4),
        "scalar": entry("F32", [], 0, 4),
        "empty_first": entry("F16", [3, 0], 0, 0),
    }
    file = read_header(write(tmp_path / "a.safetensors", header, bytes(4)))
    assert list(file.tensors) == ["empty_last", "scalar", "empty_first"]
    assert file.tensors["scalar"].shape == ()
    assert file.tensors["scalar"].nbytes == 4
    assert file.tensors["empty_first"].nbytes == 0


@pytest.mark.parametrize("padding", [b"", b" " * 4095, b"\n\t "])
def test_header_with_spaces_around(tmp_path: Path, padding: bytes) -> None:
    text = padding + json.dumps({"a": entry("U8", [3], 0, 3)}, indent=1).encode() + padding
    path = write(tmp_path / "a.safetensors", text, b"xyz")
    extent = read_header(path).tensors["a"].extents[0]
    assert path.read_bytes()[extent.offset :] == b"xyz"


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "z": "é"}])
def test_extra_keys_and_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    header = {"__metadata__": metadata, "a": entry("U8", [1], 0, 1, note="from another writer")}
    path = write(tmp_path / "a.safetensors", header, b"x")
    assert [name for name, _ in safetensors.deserialize(path.read_bytes())] == ["a"]
    assert read_header(path).metadata == (metadata or {})


def test_names_of_any_script_and_unaligned_data(tmp_path: Path) -> None:
    name = "модель.слой 1/权重"
    path = write(tmp_path / "a b\n.safetensors", {"x": entry("U8", [1], 0, 1), name: entry("F32", [1], 1, 5)}, b"12345")
    assert read_header(path).tensors[name].nbytes == 4


def test_keys_in_any_order(tmp_path: Path) -> None:
    header = {"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}
    assert list(read_header(write(tmp_path / "a.safetensors", header, b"12")).tensors) == ["b", "a"]


@pytest.mark.slow
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    tensors: Tensors = [(f"model.layers.{i}.self_attn.q_proj.weight", "U8", (1, 1)) for i in range(100_000)]
    header = encode_header(tensors)
    path = tmp_path / "a.safetensors"
    path.write_bytes(header.data + bytes(100_000))
    file = read_header(path)
    assert {name: t.extents[0].offset for name, t in file.tensors.items()} == header.offsets


def test_real_files(golden: Path) -> None:
    files = sorted(golden.rglob("*.safetensors"))
    assert files
    for path in files:
        file = read_header(path)
        with safetensors.safe_open(path, "np") as real:
            names = list(real.keys())
            metadata = real.metadata()
            stored = {n: (real.get_slice(n).get_dtype(), tuple(real.get_slice(n).get_shape())) for n in names}
        assert {name: (t.dtype, t.shape) for name, t in file.tensors.items()} == stored
        assert file.metadata == (metadata or {})
        # What transformers and xtuner saved is what we would have written.
        again = encode_header([(t.name, t.dtype, t.shape) for t in file.tensors.values()], metadata=file.metadata)
        with path.open("rb") as stream:
            assert stream.read(file.data_start) == again.data
