"""What `torch.save` writes, without torch: a zip of one pickle and the bytes of each tensor, in the places of a plan.

The form is that of torch 1.6 and later (torch/serialization.py `_save`, caffe2/serialize/inline_container.cc): entries
are stored, not packed; the data of each begins at a multiple of 64 bytes; the pickle names what rebuilds a tensor, and
its storage by a persistent id. It loads with `weights_only=True`. Equal tensors give equal bytes: there is no date.

Everything but the tensors' bytes and their CRC-32s is known before a byte is read, so that the file can be filled in
any order. Sizes that 32 bits do not hold are told as APPNOTE.TXT 4.5.3 says (zip64), which torch reads.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import nbytes_of
from llava_convert.core.values import dataclass

Info = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""

_ROOT = "archive"  # what torch calls it where it writes to no file
_ALIGNMENT = 64
_DAY = 33  # 1980-01-01, the first that a zip can say
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "it is in the zip64 field"
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


def require_storage(name: str, dtype: str) -> None:
    """Raises UnsupportedError for a dtype which files of torch cannot hold."""
    if dtype not in _STORAGES:
        raise UnsupportedError(f"{name} is {dtype}, which torch's own files have no storage of")


@dataclass(frozen=True)
class Archive:
    """A file that is known but for its tensors: `pieces` by their places, and where each tensor's bytes belong.

    `checks` are the places, by tensor, that take the CRC-32 of its bytes (four, little-endian); zero until then, which
    torch takes for "not computed".
    """

    pieces: tuple[tuple[int, bytes], ...]
    offsets: Mapping[str, int]
    checks: Mapping[str, tuple[int, ...]]
    size: int


def plan_torch(infos: Sequence[Info], around: Mapping[str, Any] | None = None, key: str = "") -> Archive:
    """The file of these tensors: a dict of them, or `around` with that dict under `key`.

    `around` holds what JSON does. Raises UnsupportedError for a dtype that torch has no storage of, TypeError for other
    values in `around`.
    """
    tensors = {f"{_ROOT}/data/{number}": info for number, info in enumerate(infos)}
    known = {f"{_ROOT}/data.pkl": _pickle(infos, around, key), f"{_ROOT}/byteorder": b"little"}
    last = {f"{_ROOT}/version": b"3\n"}
    pieces: list[tuple[int, bytes]] = []
    offsets: dict[str, int] = {}
    checks: dict[str, tuple[int, int]] = {}
    directory = bytearray()
    pending: list[tuple[str, int, int]] = []
    at = 0
    for name in [*known, *tensors, *last]:
        content = known.get(name, last.get(name))
        length = len(content) if content is not None else nbytes_of(tensors[name][1], prod(tensors[name][2]))
        crc = zlib.crc32(content) if content is not None else 0
        local = _local(name, at, crc, length)
        pieces.append((at, local + (content or b"")))
        if content is None:
            offsets[tensors[name][0]] = at + len(local)
            pending.append((tensors[name][0], at + 14, len(directory) + 16))
        directory += _central(name, at, crc, length)
        at += len(local) + length
    for tensor, place, inside in pending:
        checks[tensor] = (place, at + inside)
    end = _end(len(known) + len(tensors) + len(last), at, len(directory))
    pieces.append((at, bytes(directory) + end))
    return Archive(_joined(pieces), offsets, checks, at + len(directory) + len(end))


def _joined(pieces: Iterable[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Neighbours in one."""
    found: list[tuple[int, bytes]] = []
    for at, data in pieces:
        if found and found[-1][0] + len(found[-1][1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + data)
        else:
            found.append((at, data))
    return tuple(found)


def _local(name: str, at: int, crc: int, length: int) -> bytes:
    """A local header, up to the data (APPNOTE.TXT 4.3.7)."""
    extra = b"" if length < _FULL32 else struct.pack("<2H2Q", 1, 16, length, length)
    extra += _padding(at + 30 + len(name) + len(extra))
    return struct.pack("<4s5H3I2H", b"PK\x03\x04", *_fields(name, crc, length), len(extra)) + name.encode() + extra


def _central(name: str, at: int, crc: int, length: int) -> bytes:
    """The entry of the directory (APPNOTE.TXT 4.3.12); its padding is that of the local header."""
    wide = [length, length] if length >= _FULL32 else []
    wide += [at] if at >= _FULL32 else []
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    extra += _padding(at + 30 + len(name) + (20 if length >= _FULL32 else 0))
    made = struct.pack("<4s6H3I2H", b"PK\x01\x02", 20, *_fields(name, crc, length), len(extra))
    return made + struct.pack("<3H2I", 0, 0, 0, 0, min(at, _FULL32)) + name.encode() + extra


def _fields(name: str, crc: int, length: int) -> tuple[int, ...]:
    """What both headers of an entry say: version, flags, method, time, day, CRC, two sizes, the name's length."""
    size = min(length, _FULL32)
    return 0, 0, 0, 0, _DAY, crc, size, size, len(name)


def _padding(at: int) -> bytes:
    """An extra field (`FB`, as torch calls it) after which an entry's data begin at a boundary."""
    short = -(at + 4) % _ALIGNMENT
    return b"FB" + struct.pack("<H", short) + bytes(short)


def _end(count: int, start: int, length: int) -> bytes:
    """What ends the file (APPNOTE.TXT 4.3.14 to 4.3.16)."""
    found = b""
    if count >= _FULL16 or start >= _FULL32:
        record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
        found = record + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    few = min(count, _FULL16)
    return found + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, few, few, min(length, _FULL32), min(start, _FULL32), 0)


def _pickle(infos: Sequence[Info], around: Mapping[str, Any] | None, key: str) -> bytes:
    """The tree, protocol 2."""
    state = b"}" + b"".join(_entry(number, *info) for number, info in enumerate(infos))
    if around is None:
        return b"\x80\x02" + state + b"."
    rest = b"".join(_value(name) + _value(value) + b"s" for name, value in around.items())
    return b"\x80\x02}" + rest + _text(key) + state + b"s."


def _entry(number: int, name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """A name, a call of `_rebuild_tensor_v2`, and the opcode that sets it."""
    require_storage(name, dtype)
    storage = _call_args(
        _text("storage"), _global("torch", _STORAGES[dtype]), _text(str(number)), _text("cpu"), _int(prod(shape))
    )
    strides = tuple(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1] if shape else ()
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = (storage + b"Q", _int(0), _ints(shape), _ints(strides), b"\x89", hooks)
    return _text(name) + _global("torch._utils", "_rebuild_tensor_v2") + _call_args(*arguments) + b"Rs"


def _value(value: Any) -> bytes:
    """A plain value, as JSON has them."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _int(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, Mapping):
        return b"}" + b"".join(_value(name) + _value(inner) + b"s" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return b"]" + b"".join(_value(inner) + b"a" for inner in value)
    raise TypeError(f"{type(value).__name__} has no place in a file of torch")


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
