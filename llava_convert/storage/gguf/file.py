"""The GGUF format: metadata and tensors of llama.cpp, read with suspicion and written to the byte.

A file is a header (magic, version, counts), typed metadata, the tensors' names, shapes, types and offsets, then their
data, each aligned (ggml, docs/gguf.md). The runtime's own reader trusts much of it: the checks here are ours (fault
rows 81 to 86).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.ggml_types import GIVEN_UP, NUMBERS, TYPES, whole_blocks
from llava_convert.core.tensors import MAX_TENSORS, QUANTS, Extent, StoredTensor, nbytes_of, require_few
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import open_regular, read_fully, reject_stand_in, require_inside, size_of
from llava_convert.storage.gguf.values import MANY, Cursor, Strings, Typed, encode_string, encode_value
from llava_convert.storage.safetensors import check_name

__all__ = ["NUMBERS", "Gguf", "GgufFile", "Typed", "encode_gguf", "open_gguf", "read_gguf"]

MAGIC, VERSION = b"GGUF", 3
READ_VERSIONS = (2, 3)  # of one layout: 3 only added big-endian files; gguf.cpp and gguf-py read both too
ALIGNMENT = 32
MAX_DIMENSIONS = 4  # ggml.h: GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # ggml.h: GGML_MAX_NAME counts a NUL; llama.cpp refuses a file with a longer one
MAX_KEY_BYTES = 65535  # of the specification
_ALIGNMENT_KEY = "general.alignment"
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_OTHERS = {b"ggml": "ggml", b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}
_DAMAGED = "the file is damaged; get it again"
_MOST_ELEMENTS = 2**60  # an i64 still counts their bytes
_LEAST_KEY = 8 + 1 + 4 + 1  # bytes: its length, itself, a type, a value
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8  # bytes: the length of its name, the name, no dimensions, a type, an offset


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file by its header. Shapes are row-major: the last dimension is ggml's `ne[0]`."""

    path: Path
    size: int
    version: int
    alignment: int
    metadata: dict[str, Typed]
    tensors: dict[str, StoredTensor]
    data_start: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """A model's file, or all parts of a split one. `shard_of` names the file of each tensor."""

    files: tuple[Path, ...]
    metadata: dict[str, Typed]
    tensors: dict[str, StoredTensor]
    shard_of: dict[str, str]


def read_gguf(path: Path, known: list[Strings] | None = None) -> GgufFile:
    """The header of the GGUF file `path`, every count and offset checked; no weight is read.

    Vocabularies that are in `known` are not read again, others are put there.

    Raises InputError for a file that is missing, truncated, corrupt or no GGUF; UnsupportedError for other versions,
    byte orders and types than those of today (fault rows 81-83, 86).
    """
    where = printable(path)
    with open_regular(path) as stream:
        size = size_of(stream)

        def read(offset: int, count: int) -> bytes:
            stream.seek(offset)
            return read_fully(stream, count, path)

        cursor = Cursor(read, size, where, known)
        _check_start(path, read(0, 512), size)
        cursor.take(len(MAGIC), "the head")
        version = cursor.number("u32", "the head")
        tensor_count, key_count = cursor.number("u64", "the head"), cursor.number("u64", "the head")
        for count, what, least in ((tensor_count, "tensors", _LEAST_TENSOR), (key_count, "keys", _LEAST_KEY)):
            if count > min(MAX_TENSORS, size // least):
                raise InputError(
                    f"{where}: {count:,} {what} announced, more than {size:,} bytes, or any model, can hold",
                    hint=_DAMAGED,
                )
        metadata = _read_metadata(cursor, key_count, where)
        alignment = _alignment(metadata, where)
        infos = [_read_info(cursor, where) for _ in range(tensor_count)]
        # A file without tensors may end with its header, unpadded.
        data_start = _padded(cursor.position, alignment) if infos else cursor.position
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, offset in infos:
        if name in tensors:
            raise InputError(f"{where}: tensor {printable(name)} is there twice")
        if offset % alignment:
            raise InputError(f"{where}: tensor {printable(name)}: offset {offset:,} is not a multiple of {alignment}")
        tensors[name] = _located(path, where, size, data_start + offset, name, dtype, shape)
    _check_coverage(where, list(tensors.values()), data_start, alignment)
    return GgufFile(path, size, version, alignment, metadata, tensors, data_start)


def open_gguf(path: Path, known: list[Strings] | None = None) -> Gguf:
    """A file, or every part of a split one, of which `path` is any (`NAME-00001-of-00003.gguf`).

    Raises InputError for parts that are missing or not of one model; what `read_gguf` raises.
    """
    first = read_gguf(path, known)
    count = _count(first.metadata, "split.count")
    if count < 2:
        return _joined([first])
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise InputError(
            f"{printable(path)}: one of {count} parts of a model, under a name that does not say so",
            hint=f"give all parts their names again: NAME-00001-of-{count:05d}.gguf",
        )
    paths = [path.with_name(f"{named[1]}-{n:05d}-of-{count:05d}{path.suffix}") for n in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(
            f"{printable(path)}: {len(missing)} of its {count} parts are missing: {listed(missing)}",
            hint="download them into the same folder",
        )
    parts: list[GgufFile] = []
    for one in paths:
        parts.append(first if one == path else read_gguf(require_inside(one.parent, one.name)))
        require_few(printable(one), sum(len(part.tensors) for part in parts))
    for number, part in enumerate(parts):
        if (_count(part.metadata, "split.no"), _count(part.metadata, "split.count")) != (number, count):
            raise InputError(
                f"{printable(part.path)}: its header does not say that it is part {number + 1} of {count}",
                hint="it belongs to another model, or was renamed; get it again",
            )
    found = _joined(parts)
    for part in parts:
        total = _count(part.metadata, "split.tensors.count")
        if total != len(found.tensors):
            raise InputError(
                f"{printable(part.path)}: says that all parts hold {total:,} tensors, "
                f"but they hold {len(found.tensors):,}",
                hint="its parts are not of one model; get them again",
            )
    return found


def _joined(parts: Sequence[GgufFile]) -> Gguf:
    tensors: dict[str, StoredTensor] = {}
    shard_of: dict[str, str] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise InputError(f"{printable(part.path)}: tensor {printable(name)} is in {shard_of[name]} too")
            tensors[name], shard_of[name] = tensor, part.path.name
    return Gguf(tuple(p.path for p in parts), parts[0].metadata, tensors, shard_of)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that comes before the data, in pieces, and where in the file each tensor's bytes then belong."""

    pieces: tuple[bytes, ...]
    offsets: dict[str, int]
    size: int  # of the whole file

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def encode_gguf(
    metadata: Mapping[str, Typed],
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    alignment: int = ALIGNMENT,
    encoded: dict[int, bytes] | None = None,
) -> GgufHeader:
    """The header for `tensors` of (name, dtype, row-major shape) in the order given.

    Each tensor starts, and the file ends, at a multiple of `alignment`; what lies between is zeros. The bytes are those
    which gguf-py's writer makes. `encoded` holds vocabularies for several files with the same values, by `id`; each is
    a piece of its own. Raises ValueError for what the format cannot say, since it is the caller's.
    """
    encoded = {} if encoded is None else encoded
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    told = Typed("u32", alignment)
    if metadata.get(_ALIGNMENT_KEY, Typed("u32", ALIGNMENT)) != told:
        metadata = {**metadata, _ALIGNMENT_KEY: told}
    pieces: list[bytes] = []
    small = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, typed in metadata.items():
        small.append(encode_string(key))
        if isinstance(typed.value, list | tuple) and len(typed.value) >= MANY:
            if id(typed) not in encoded:
                encoded[id(typed)] = encode_value(typed)
            pieces += [b"".join(small), encoded[id(typed)]]
            small = []
        else:
            small.append(encode_value(typed))
    offsets: dict[str, int] = {}
    at = 0
    for name, dtype, shape in tensors:
        if name in offsets or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"tensor name {name!r} is given twice, or not for GGUF")
        if dtype not in NUMBERS or len(shape) > MAX_DIMENSIONS or not whole_blocks(dtype, shape):
            raise ValueError(f"tensor {name!r}: {dtype} of shape {shape} is not for GGUF")
        offsets[name] = at
        small += [encode_string(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *shape[::-1])]
        small.append(struct.pack("<IQ", NUMBERS[dtype], at))
        at += _padded(nbytes_of(dtype, prod(shape)), alignment)
    length = sum(map(len, pieces)) + sum(map(len, small))
    start = _padded(length, alignment)
    pieces.append(b"".join(small) + bytes(start - length))
    return GgufHeader(tuple(pieces), {name: start + place for name, place in offsets.items()}, start + at)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_start(path: Path, head: bytes, size: int) -> None:
    """Raises InputError where the file is something else, UnsupportedError for versions that are not read."""
    where = printable(path)
    if not head.startswith(MAGIC):
        reject_stand_in(path, head)
        if head[:4] in _OTHERS:
            raise UnsupportedError(
                f"{where}: is in the format {_OTHERS[head[:4]]}, from before GGUF",
                hint="get the model as GGUF, or convert it again",
            )
        raise InputError(f"{where}: not a GGUF file: it begins {printable(head[:4])}")
    if size < 24:
        raise InputError(f"{where}: truncated: {size} bytes, fewer than a header has", hint="get the file again")
    version = int.from_bytes(head[4:8], "little")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(
            f"{where}: big-endian GGUF (version {int.from_bytes(head[4:8], 'big')})",
            hint="gguf-convert-endian FILE little, of gguf-py, turns it round",
        )
    if version > VERSION:
        raise UnsupportedError(
            f"{where}: GGUF version {version:,}; {VERSION} is the latest that is known", hint="update llava-convert"
        )
    if version not in READ_VERSIONS:
        raise UnsupportedError(
            f"{where}: GGUF version {version}, which llama.cpp gave up too; versions 2 and 3 are read",
            hint="get the model in today's version, or convert it again",
        )


def _read_metadata(cursor: Cursor, count: int, where: str) -> dict[str, Typed]:
    found: dict[str, Typed] = {}
    for _ in range(count):
        key = cursor.name("a key", MAX_KEY_BYTES)
        if not key or not key.isprintable():
            raise InputError(f"{where}: bad key '{printable(key)}' in the metadata")
        if key in found:
            raise InputError(f"{where}: key {printable(key)} is there twice")
        found[key] = cursor.value(f"key {printable(key)}")
    return found


def _alignment(metadata: Mapping[str, Typed], where: str) -> int:
    typed = metadata.get(_ALIGNMENT_KEY, Typed("u32", ALIGNMENT))
    value = typed.value
    if typed.kind != "u32" or value == 0 or value & (value - 1):
        raise InputError(f"{where}: {_ALIGNMENT_KEY} is {typed.kind} {printable(value)}, not a u32 power of two")
    return int(value)


def _count(metadata: Mapping[str, Typed], key: str) -> int:
    typed = metadata.get(key)
    return typed.value if typed is not None and type(typed.value) is int else 0


def _read_info(cursor: Cursor, where: str) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.name("a tensor's name", 1024)
    check_name(where, name)
    dimensions = cursor.number("u32", f"tensor {printable(name)}")
    if dimensions > MAX_DIMENSIONS:
        raise InputError(
            f"{where}: tensor {printable(name)} has {dimensions:,} dimensions, GGUF knows {MAX_DIMENSIONS}"
        )
    sizes = [cursor.number("u64", f"tensor {printable(name)}") for _ in range(dimensions)]
    number = cursor.number("u32", f"tensor {printable(name)}")
    if number not in TYPES:
        gone = GIVEN_UP.get(number)
        kind = f"{gone}, a type that llama.cpp gave up" if gone else f"the unknown type {number:,}"
        raise UnsupportedError(f"{where}: tensor {printable(name)} is of {kind}", hint="get the model in another type")
    return name, TYPES[number], tuple(sizes[::-1]), cursor.number("u64", f"tensor {printable(name)}")


def _located(
    path: Path, where: str, size: int, start: int, name: str, dtype: str, shape: tuple[int, ...]
) -> StoredTensor:
    """A tensor at its place. Raises InputError where its size overflows, is no whole blocks, or leaves the file."""
    # Also where a 0 makes the count small again: NumPy makes no array of such a shape either.
    if prod(max(1, dimension) for dimension in shape) >= _MOST_ELEMENTS:
        raise InputError(f"{where}: tensor {printable(name)}: shape {printable(list(shape))} overflows")
    if not whole_blocks(dtype, shape):
        raise InputError(
            f"{where}: tensor {printable(name)}: rows of {shape[-1] if shape else 1:,} are not whole blocks of "
            f"{dtype}, which hold {QUANTS[dtype][0]}"
        )
    nbytes = nbytes_of(dtype, prod(shape))
    if start + nbytes > size:
        raise InputError(
            f"{where}: truncated: tensor {printable(name)} ends at byte {start + nbytes:,} of a file of {size:,}",
            hint="the download is incomplete; get it again",
        )
    return StoredTensor(name, dtype, shape, (Extent(path, start, nbytes),))


def _check_coverage(where: str, tensors: list[StoredTensor], data_start: int, alignment: int) -> None:
    """Tensors lie one after another with nothing but padding between, or a shape is not the one that was written.

    gguf.cpp refuses other files too, and those whose tensors are not in the order of their data, which does no harm.
    """
    reached, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.extents[0].offset, t.extents[0].length)):
        extent = tensor.extents[0]
        if not extent.length:
            continue
        names = f"{printable(previous)} and {printable(tensor.name)}"
        if extent.offset < reached:
            raise InputError(f"{where}: tensors {names} overlap", hint=_DAMAGED)
        if extent.offset > reached:
            raise InputError(f"{where}: hole of {extent.offset - reached:,} bytes between {names}", hint=_DAMAGED)
        reached, previous = extent.offset + _padded(extent.length, alignment), tensor.name
