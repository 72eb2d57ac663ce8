"""GGUF files of random contents, and damaged ones, against gguf-py's writer and reader."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava_convert.core.errors import ConvertError
from llava_convert.core.ggml_types import TYPES
from llava_convert.core.tensors import QUANTS, nbytes_of
from llava_convert.storage.gguf.file import GgufFile, Typed, encode_gguf, read_gguf

# No deadline: the machines that run this are shared.
RANDOM = settings(deadline=None, max_examples=150)

KINDS = {
    "u8": GGUFValueType.UINT8, "i8": GGUFValueType.INT8, "u16": GGUFValueType.UINT16, "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32, "i32": GGUFValueType.INT32, "u64": GGUFValueType.UINT64, "i64": GGUFValueType.INT64,
    "f32": GGUFValueType.FLOAT32, "f64": GGUFValueType.FLOAT64, "bool": GGUFValueType.BOOL, "str": GGUFValueType.STRING,
}  # fmt: skip
FROM_GGUF_PY = {value: kind for kind, value in KINDS.items()}
TYPES_THERE = [name for name in TYPES.values() if name in GGMLQuantizationType.__members__]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# Not two dots, which no path may hold; and printable, as names are.
names = st.from_regex(r"[a-z_é]{1,6}(\.[a-z0-9_]{1,4}){0,3}", fullmatch=True)


def values(kind: str) -> st.SearchStrategy[object]:
    if kind in ("bool", "str"):
        return st.booleans() if kind == "bool" else texts
    bits = int(kind[1:])
    if kind[0] == "f":
        return st.floats(width=bits, allow_nan=False)
    return st.integers(0, 2**bits - 1) if kind[0] == "u" else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@st.composite
def typed(draw: st.DrawFn) -> Typed:
    kind = draw(st.sampled_from(sorted(KINDS)))
    if draw(st.booleans()):
        return Typed(kind, draw(values(kind)))
    return Typed(f"[{kind}]", tuple(draw(st.lists(values(kind), min_size=1, max_size=5))))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, str, tuple[int, ...]]:
    dtype = draw(st.sampled_from(TYPES_THERE))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape[-1] *= QUANTS.get(dtype, (1, 0))[0]
    return draw(names), dtype, tuple(shape)


metadata = st.dictionaries(names.map(lambda name: f"x.{name}"), typed(), max_size=6)
several = st.lists(tensors(), max_size=5, unique_by=lambda t: t[0])
alignments = st.sampled_from([1, 8, 32, 64])


@contextmanager
def file_of(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(content)
        yield path


def data_of(tensor: tuple[str, str, tuple[int, ...]], number: int) -> bytes:
    return np.random.default_rng(number).bytes(nbytes_of(tensor[1], prod(tensor[2])))


def by_gguf_py(keys: dict[str, Typed], infos: list[tuple[str, str, tuple[int, ...]]], alignment: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_custom_alignment(alignment)
        for name, value in keys.items():
            kind = KINDS[value.kind.strip("[]")]
            if value.kind.startswith("["):
                writer.add_key_value(name, list(value.value), GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(name, value.value, kind)
        for number, (name, dtype, shape) in enumerate(infos):
            # The shape is told in bytes, of which the writer makes that in weights.
            row = nbytes_of(dtype, shape[-1])
            raw = np.frombuffer(data_of(infos[number], number), np.uint8).reshape(*shape[:-1], row)
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@pytest.mark.slow
@RANDOM
@given(metadata, several, alignments)
def test_against_gguf_py(keys: dict[str, Typed], infos: list[tuple[str, str, tuple[int, ...]]], alignment: int) -> None:
    told = {"general.architecture": Typed("str", "llama"), "general.alignment": Typed("u32", alignment)} | keys
    header = encode_gguf(told, infos, alignment=alignment)
    made = bytearray(header.data) + bytes(header.size - len(header.data))
    for number, info in enumerate(infos):
        data = data_of(info, number)
        made[header.offsets[info[0]] : header.offsets[info[0]] + len(data)] = data
    assert bytes(made) == by_gguf_py(keys, infos, alignment)
    with file_of(bytes(made)) as path:
        found = read_gguf(path)
        assert found.metadata == told
        assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == infos
        assert {t.name: t.extents[0].offset for t in found.tensors.values()} == header.offsets
        _same(found, path)


def _same(found: GgufFile, path: Path) -> None:
    """gguf-py reads the same keys, values and tensors from the file."""
    reader = gguf.GGUFReader(path)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(theirs) == list(found.metadata)
    for name, field in theirs.items():
        value = found.metadata[name]
        array = field.types[0] == GGUFValueType.ARRAY
        if array and len(field.types) == 1:  # gguf-py forgets the type of an empty array
            assert value.value == ()
            continue
        assert value.kind == (f"[{FROM_GGUF_PY[field.types[1]]}]" if array else FROM_GGUF_PY[field.types[0]])
        parts = [bytes(field.parts[i]) for i in field.data]
        if "bool" in value.kind:  # any byte but 0 is true
            parts = [bytes([part != b"\0"]) for part in parts]
        assert _bytes(value) == parts, name
    assert [t.name for t in reader.tensors] == list(found.tensors)
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert (ours.dtype, list(ours.shape[::-1])) == (tensor.tensor_type.name, tensor.shape.tolist())
        (extent,) = ours.extents
        assert (extent.offset, extent.length) == (tensor.data_offset, tensor.n_bytes)
        assert tensor.data.nbytes == tensor.n_bytes


def _bytes(value: Typed) -> list[bytes]:
    """Each element as it lies in the file."""
    elements = value.value if value.kind.startswith("[") else [value.value]
    kind = value.kind.strip("[]")
    if kind == "str":
        return [element.encode("utf-8", "surrogateescape") for element in elements]
    form = {"bool": "?", "f32": "f", "f64": "d"}.get(kind) or {"8": "b", "16": "h", "32": "i", "64": "q"}[kind[1:]]
    return [struct.pack(f"<{form.upper() if kind[0] == 'u' else form}", element) for element in elements]


SMALL = encode_gguf(
    {
        "a": Typed("str", "xyz"), "general.alignment": Typed("u32", 32), "b": Typed("[str]", ("p", "", "qr")),
        "c": Typed("u8", 3), "d": Typed("[f32]", (1.0, 2.0)), "e": Typed("i64", -5), "f": Typed("[i16]", (1,)),
    },
    [("w", "F32", (2, 3)), ("x", "Q4_0", (2, 32)), ("y", "I8", (3,))],
)  # fmt: skip
WHOLE = SMALL.data + bytes(SMALL.size - len(SMALL.data))


@pytest.mark.slow
@settings(deadline=None, max_examples=600)
@given(st.integers(4, len(SMALL.data) - 1), st.integers(0, 255))
@example(4, 2)
def test_what_is_taken_of_a_damaged_file_is_what_gguf_py_reads(at: int, byte: int) -> None:
    damaged = WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]
    with file_of(damaged) as path:
        try:
            found = read_gguf(path)
        except ConvertError:
            return
        _same(found, path)


def test_a_fair_part_of_the_damaged_files_is_taken() -> None:
    """Or the test above would compare nothing: a byte of a name, a value or the padding may be another."""
    taken = 0
    with file_of(WHOLE) as path:
        for at in range(4, len(SMALL.data)):
            path.write_bytes(WHOLE[:at] + b"z" + WHOLE[at + 1 :])
            try:
                read_gguf(path)
            except ConvertError:
                continue
            taken += 1
    assert 40 < taken < len(SMALL.data) - 100
