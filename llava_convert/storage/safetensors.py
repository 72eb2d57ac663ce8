"""The safetensors format: a header that says where every tensor lies, read with suspicion and written to the byte.

The file is: the header's length (8 bytes, little-endian), the header (JSON), the data. The rules are those of
safetensors 0.8 (huggingface/safetensors, README "Format" and safetensors/src/tensor.rs), and stricter where that
library is lenient and a conversion would go wrong: a name that is there twice, a name that is a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import DTYPE_BITS, Extent, StoredTensor, require_few
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import open_regular, read_fully, reject_stand_in, size_of
from llava_convert.storage.json_files import parse_json

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # of safetensors itself: MAX_HEADER_SIZE
MAX_NAME_BYTES = 1024
FORMAT_PT: Mapping[str, str] = MappingProxyType({"format": "pt"})
PAGE = 4096

_METADATA = "__metadata__"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LENGTH_BYTES = 8
_COUNT_LIMIT = 2**64  # counts and offsets are u64 in the format
# The library sorts by its enum of dtypes, which rises with the alignment but also decides between equals (measured).
_WRITE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(_WRITE_ORDER)}
# The first bytes of other formats that get this suffix by a renaming.
_OTHERS = {b"PK\x03\x04": "a torch (zip) checkpoint", b"GGUF": "a GGUF file", b"\x80\x02": "a pickle"}


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file by its header; the tensors are in the header's order, their offsets those of the file."""

    path: Path
    size: int
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Header:
    """All that comes before the data (`data`), and where in the file each tensor's bytes then belong.

    `order` is that of the bytes; `offsets` count from the start of the file; `size` is that of the whole file.
    """

    data: bytes
    order: list[str]
    offsets: dict[str, int]
    size: int


def read_header(path: Path) -> SafetensorsFile:
    """The tensors of the safetensors file `path`, located and checked; only the header is read.

    Raises InputError for a file that is missing, no regular file, truncated, corrupt or no safetensors file at all
    (fault rows 1-11, 13, 15, 16, 19, 20, 32); UnsupportedError for a dtype that is not in `spec` (row 12).
    """
    where = printable(path)
    with open_regular(path) as stream:
        size = size_of(stream)
        start = read_fully(stream, min(size, 512), path)
        _check_start(path, start)
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        _check_length(where, start, length, size)
        text = start[_LENGTH_BYTES : _LENGTH_BYTES + length]
        text += read_fully(stream, length - len(text), path)
    if len(text) < length:
        raise InputError(f"{where}: truncated while it was read")
    require_few(where, text.count(b'"data_offsets"'))  # before memory moves
    header = parse_json(text, f"{where}: header", unique_keys=True)
    if not isinstance(header, dict):
        raise InputError(f"{where}: header: not an object of tensors")
    metadata = _metadata(where, header.pop(_METADATA, None))
    if not header:
        raise InputError(f"{where}: holds no tensors")
    require_few(where, len(header))
    data_start = _LENGTH_BYTES + length
    tensors = {name: _tensor(path, where, data_start, name, entry) for name, entry in header.items()}
    _check_coverage(where, list(tensors.values()), data_start, size)
    return SafetensorsFile(path, size, data_start, metadata, tensors)


def check_name(where: str, name: str) -> None:
    """Raises InputError for a tensor name that no model has and that could do harm in a path or on a terminal.

    (Fault row 15: control characters, `..`, thousands of characters, nothing; also half a surrogate pair, which no
    UTF-8 holds.)
    """
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError(f"{where}: tensor name {printable(name)} is not Unicode text") from None
    if _CONTROL.search(name) or ".." in name or not 0 < length <= MAX_NAME_BYTES:
        raise InputError(
            f"{where}: bad tensor name: '{printable(name)}'", hint="no model names a tensor so; get it again"
        )


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = FORMAT_PT,
    data_start_mod: int | None = None,
) -> Header:
    """The header for `tensors` of (name, dtype, shape), the same bytes every time.

    It is what the safetensors library writes: dtypes in its order, then names in code point order, and spaces up to a
    multiple of 8. (Its metadata are in random order when there are several; here they are sorted.) With
    `data_start_mod` further spaces follow, at most 4095, so that the data begin at that offset modulo 4096: bytes
    then can be cloned from a file where they lie alike. It must be a multiple of 8, as the data's start is; where the
    source's is not (foreign writers), congruence is not to be had without unaligned tensors: pass None.

    Raises ValueError for a name given twice, an unknown dtype or such a `data_start_mod`, since these are the
    caller's; UnsupportedError for a header that readers refuse.
    """
    if data_start_mod is not None and not (0 <= data_start_mod < PAGE and data_start_mod % 8 == 0):
        raise ValueError(f"data_start_mod {data_start_mod} is not a multiple of 8 below {PAGE}")
    unknown = {dtype for _, dtype, _ in tensors} - _RANK.keys()
    if unknown:
        raise ValueError(f"dtypes {sorted(unknown)} have no place in a safetensors file")
    entries: dict[str, object] = {} if metadata is None else {_METADATA: dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (_RANK[tensor[1]], tensor[0])):
        if name in entries:
            raise ValueError(f"tensor {name!r} is given twice, or is not a name for a tensor")
        starts[name] = end
        end += prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    # serde_json writes no spaces and escapes as Python does with ensure_ascii off.
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = len(text) + -len(text) % 8
    if data_start_mod is not None:
        length += (data_start_mod - _LENGTH_BYTES - length) % PAGE
    if length > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"a header of {length:,} bytes for {len(starts):,} tensors: safetensors readers take {MAX_HEADER_BYTES:,}",
            hint="choose a smaller --max-shard-size",
        )
    data = length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)
    offsets = {name: len(data) + start for name, start in starts.items()}
    return Header(data, list(starts), offsets, len(data) + end)


def _check_start(path: Path, start: bytes) -> None:
    """Raises InputError where the file is something else, which its length field would only hide."""
    reject_stand_in(path, start)
    for magic, kind in _OTHERS.items():
        # The length of a real header leaves the upper half of its field 0.
        if start.startswith(magic) and start[4:_LENGTH_BYTES] != bytes(4):
            raise InputError(f"{printable(path)}: is {kind}, not a safetensors file", hint="give it its own suffix")
    field = start[:_LENGTH_BYTES].strip()
    if len(start) >= _LENGTH_BYTES and field.isascii() and field.decode("ascii").isprintable():
        begins = printable(start[:40].decode("latin-1"))
        raise InputError(
            f"{printable(path)}: looks like a web page or message, not weights: it begins {begins}",
            hint="download it again; a message in place of a file often means that a login or a token was missing",
        )


def _check_length(where: str, start: bytes, length: int, size: int) -> None:
    if len(start) < _LENGTH_BYTES:
        raise InputError(f"{where}: truncated: {size} bytes, fewer than the {_LENGTH_BYTES} of the header's length")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{where}: not a safetensors file: says that its header has {length:,} bytes")
    if length > size - _LENGTH_BYTES:
        raise InputError(
            f"{where}: truncated: a header of {length:,} bytes in a file of {size:,}",
            hint="the download is incomplete; get it again",
        )


def _metadata(where: str, found: Any) -> dict[str, str]:
    if found is None:  # the library takes null for absent
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{where}: header: {_METADATA} is not an object of strings")
    return found


def _tensor(path: Path, where: str, data_start: int, name: str, entry: Any) -> StoredTensor:
    """One entry of the header. Keys other than the three are ignored, as the library does."""
    check_name(where, name)
    if not isinstance(entry, dict):
        raise InputError(f"{where}: tensor {printable(name)}: not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise InputError(f"{where}: tensor {printable(name)}: has no dtype")
    if dtype not in DTYPE_BITS:
        raise UnsupportedError(f"{where}: tensor {printable(name)}: dtype {printable(dtype)} is not supported")
    dims = _counts(shape)
    if dims is None:
        raise InputError(f"{where}: tensor {printable(name)}: shape {printable(shape)} is not a list of sizes")
    ends = _counts(span)
    if ends is None or len(ends) != 2 or ends[0] > ends[1]:
        raise InputError(f"{where}: tensor {printable(name)}: data_offsets {printable(span)} are not a range of bytes")
    needed = _nbytes(dims, DTYPE_BITS[dtype])
    if needed is None:
        raise InputError(f"{where}: tensor {printable(name)}: shape {printable(shape)} overflows")
    if needed != ends[1] - ends[0]:
        raise InputError(
            f"{where}: tensor {printable(name)}: {dtype} of shape {printable(list(dims))} is {needed:,} bytes, "
            f"but {ends[1] - ends[0]:,} are stored"
        )
    return StoredTensor(name, dtype, dims, (Extent(path, data_start + ends[0], needed),))


def _counts(found: Any) -> tuple[int, ...] | None:
    """`found` as a tuple when it is a list of u64; type() since True is an int to isinstance."""
    if isinstance(found, list) and all(type(value) is int and 0 <= value < _COUNT_LIMIT for value in found):
        return tuple(found)
    return None


def _nbytes(shape: tuple[int, ...], bits: int) -> int | None:
    """Size in bytes; None where the count overflows on the way, even if a later 0 would make it small again."""
    count = 1
    for size in shape:
        count *= size
        if count * bits >= _COUNT_LIMIT:
            return None
    return count * bits // 8


def _check_coverage(where: str, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Every byte of the data belongs to one tensor. Raises InputError otherwise (fault rows 6-9)."""
    previous = "the header"
    reached = data_start
    for tensor in sorted(tensors, key=lambda t: (t.extents[0].offset, t.extents[0].length)):
        extent = tensor.extents[0]
        if extent.offset < reached:
            raise InputError(f"{where}: tensors {printable(previous)} and {printable(tensor.name)} overlap")
        if extent.offset > reached:
            gap, names = extent.offset - reached, f"{printable(previous)} and {printable(tensor.name)}"
            raise InputError(f"{where}: hole of {gap:,} bytes between {names}")
        reached += extent.length
        previous = tensor.name
    if size < reached:
        raise InputError(
            f"{where}: truncated: incomplete download? {size:,} of {reached:,} bytes are there",
            hint="get the file again",
        )
    if size > reached:
        raise InputError(f"{where}: {size - reached:,} trailing bytes after the last tensor")
