"""A state dict as `torch.save` writes it, without torch: a zip of one pickle and the bytes of each tensor.

The form is that of torch 1.6 and later (torch/serialization.py `_save`, caffe2/serialize/inline_container.cc): entries
are stored, not packed; the data of each begins at a multiple of 64 bytes; the pickle names what rebuilds a tensor, and
its storage by a persistent id. It loads with `weights_only=True`. Equal tensors give equal bytes: there is no date.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import nbytes_of

Info = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""
Data = bytes | bytearray | memoryview

_ROOT = "archive"  # what torch calls it where it writes to no file
_ALIGNMENT = 64
_DAY = 33  # 1980-01-01, the first that a zip can say
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}


def encode_torch(infos: Sequence[Info], data: Mapping[str, Data]) -> bytes:
    """The file of these tensors; `data` holds each one's bytes, contiguous and little-endian, by its name.

    Raises UnsupportedError for a dtype that torch has no storage of.
    """
    out, directory = bytearray(), bytearray()
    entries = _entries(infos, [data[name] for name, _, _ in infos])
    for name, content in entries:
        at = len(out)
        fields = _fields(name, content)
        padding = _padding(at, name)
        out += struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields, len(padding)) + name.encode() + padding + content
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, len(padding), 0, 0, 0, 0, at)
        directory += name.encode() + padding
    count = len(entries)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(out), 0)
    return bytes(out + directory + end)


def torch_size(infos: Sequence[Info]) -> int:
    """How long the file of these tensors is, before any of their bytes are known. Raises what `encode_torch` raises."""
    at = directory = 0
    lengths = [nbytes_of(dtype, prod(shape)) for _, dtype, shape in infos]
    for (name, content), length in zip(_entries(infos, [b""] * len(infos)), [0, 0, *lengths, 0], strict=True):
        padding = len(_padding(at, name))
        at += 30 + len(name) + padding + (length or len(content))
        directory += 46 + len(name) + padding
    return at + directory + 22


def _entries(infos: Sequence[Info], data: Iterable[Data]) -> list[tuple[str, Data]]:
    found: list[tuple[str, Data]] = [("data.pkl", _pickle(infos)), ("byteorder", b"little")]
    found += [(f"data/{number}", content) for number, content in enumerate(data)]
    return [(f"{_ROOT}/{name}", content) for name, content in [*found, ("version", b"3\n")]]


def _fields(name: str, content: Data) -> tuple[int, ...]:
    """What both headers of an entry say: version, flags, method, time, day, CRC, two sizes, the name's length."""
    return 0, 0, 0, 0, _DAY, zlib.crc32(content), len(content), len(content), len(name)


def _padding(at: int, name: str) -> bytes:
    """An extra field (`FB`, as torch calls it) after which an entry's data begin at a boundary."""
    short = -(at + 30 + len(name) + 4) % _ALIGNMENT
    return b"FB" + struct.pack("<H", short) + bytes(short)


def _pickle(infos: Sequence[Info]) -> bytes:
    """The state dict, protocol 2: a name and a call of `_rebuild_tensor_v2` for each tensor."""
    parts = [b"\x80\x02}"]
    for number, (name, dtype, shape) in enumerate(infos):
        if dtype not in _STORAGES:
            raise UnsupportedError(f"{name} is {dtype}, which torch's own files have no storage of")
        storage = _call_args(
            _text("storage"), _global("torch", _STORAGES[dtype]), _text(str(number)), _text("cpu"), _int(prod(shape))
        )
        strides = tuple(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1] if shape else ()
        hooks = _global("collections", "OrderedDict") + b")R"
        arguments = (storage + b"Q", _int(0), _ints(shape), _ints(strides), b"\x89", hooks)
        parts.append(_text(name) + _global("torch._utils", "_rebuild_tensor_v2") + _call_args(*arguments) + b"Rs")
    return b"".join([*parts, b"."])


def _call_args(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)  # LONG1 of eight bytes


def _ints(numbers: Iterable[int]) -> bytes:
    return _call_args(*map(_int, numbers))
