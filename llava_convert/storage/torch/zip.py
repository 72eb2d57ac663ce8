"""The zip form of torch.save (torch >= 1.6): records found by their headers, checked, and never unpacked.

`<root>/data.pkl` holds the tree, `<root>/data/<key>` each storage, uncompressed, `<root>/byteorder` the byte order
(caffe2/serialize/inline_container.h). Python's zipfile is not used: it believes the directory's sizes and offsets,
and does not say where a record's data begin. Rows 39 and 40 of the fault list. Sections: PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
import zlib
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import will_read
from llava_convert.storage.pickle import machine
from llava_convert.storage.torch.tensors import BUILDERS, Storage, is_quiet, storage_at, storage_id

MAX_DIRECTORY_BYTES = 64 << 20  # about 600,000 records
# The directory of one tensor lies in these last bytes of its archive; that of a model is read on its own.
TAIL = 4096
_LONGEST_TAIL = 65557  # with the longest comment that a zip file can end with


@dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    length: int
    crc: int


def read_zip(path: Path, stream: RawIOBase, size: int) -> machine.Loaded:
    records = _zip_records(path, stream, size)
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        found = "no data.pkl" if not roots else f"{len(roots)} files named data.pkl"
        raise InputError(f"{path}: a zip file with {found}: torch.save did not write it, or not to its end")
    (root,) = roots
    if f"{root}/constants.pkl" in records:
        raise _torchscript(path)
    order = records.get(f"{root}/byteorder")
    if order is not None and read_at(path, stream, order.offset, min(order.length, 16)) != b"little":
        raise UnsupportedError(
            f"{path}: was saved on a big-endian machine, which is not read",
            hint="save it again with torch.serialization.set_default_load_endianness on a little-endian machine",
        )
    pickled = records[f"{root}/data.pkl"]
    if pickled.length > machine.MAX_PICKLE_BYTES:
        most = machine.MAX_PICKLE_BYTES
        raise UnsafeError(f"{path}: data.pkl has {pickled.length:,} bytes; {most:,} are the most read")
    data = read_at(path, stream, pickled.offset, pickled.length)
    # torch.serialization.set_crc32_options(False) writes 0 for "not computed".
    if pickled.crc and zlib.crc32(data) != pickled.crc:
        raise InputError(f"{path}: data.pkl is damaged (its CRC-32 does not match)")

    folder = f"{root}/data/"  # up to 64 KiB long: not to be joined with the key anew for each tensor
    stored = {name.removeprefix(folder): record for name, record in records.items() if name.startswith(folder)}

    def persistent(pid: Any) -> Storage:
        type_name, key, numel = storage_id(pid, 5)
        record = stored.get(key)
        storage = storage_at(path, type_name, numel, 0 if record is None else record.offset)
        if record is None:
            if not storage.nbytes:
                return storage
            raise InputError(f"{path}: storage {printable(key)} is missing: the file is incomplete")
        if record.length < storage.nbytes:
            raise InputError(
                f"{path}: storage {printable(key)} has {record.length:,} bytes "
                f"where its tensors need {storage.nbytes:,}"
            )
        return storage

    return machine.load(data, path=path, persistent=persistent, builders=BUILDERS, quiet=is_quiet)


def _zip_records(path: Path, stream: RawIOBase, size: int) -> dict[str, _Record]:
    """Every record of an archive, located by its *local* header (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14 to 4.3.16)."""
    start, end, count = _zip_directory(path, stream, size)
    directory = read_at(path, stream, start, end - start)
    found: list[tuple[str, bytes, int, int, int]] = []
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > len(directory):
            raise InputError(f"{path}: its zip directory is damaged at byte {start + at}")
        (flags, method, crc, packed, unpacked, n_name, n_extra, n_comment, header) = struct.unpack_from(
            "<8xHH4xLLLHHH8xL", directory, at
        )
        raw = directory[at + 46 : at + 46 + n_name]
        extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
        at += 46 + n_name + n_extra + n_comment
        if at > len(directory):
            raise InputError(f"{path}: its zip directory is damaged at its end")
        try:
            name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        except UnicodeDecodeError:
            raise InputError(f"{path}: its zip directory holds a name that is not text") from None
        unpacked, packed, header = _zip64_fields(path, extra, unpacked, packed, header)
        _check_record(path, name, flags, method, packed, unpacked)
        found.append((name, raw, header, packed, crc))
    will_read(stream, [(header, 30 + len(raw)) for _, raw, header, _, _ in found])
    records: dict[str, _Record] = {}
    spans: list[tuple[int, int, str]] = []
    for name, raw, header, packed, crc in found:
        if name in records:
            raise UnsafeError(
                f"{path}: has two records named {printable(name)}, so that readers may see different files"
            )
        offset = _data_offset(path, stream, header, raw)
        if offset + packed > start:
            raise InputError(f"{path}: record {printable(name)} runs past the end of the data: truncated or damaged")
        records[name] = _Record(offset, packed, crc)
        spans.append((header, offset + packed, name))
    if len(records) != count:
        raise InputError(f"{path}: its zip directory tells {count} records and holds {len(records)}")
    spans.sort()
    for (_, before_end, before), (after_start, _, after) in pairwise(spans):
        if after_start < before_end:
            raise UnsafeError(f"{path}: records {printable(before)} and {printable(after)} overlap")
    return records


def _zip_directory(path: Path, stream: RawIOBase, size: int) -> tuple[int, int, int]:
    """Start, end and number of entries of the central directory, zip64 or not."""
    for longest in (TAIL, _LONGEST_TAIL):
        tail_at = max(0, size - longest)
        at = _end_record(tail := read_at(path, stream, tail_at, size - tail_at))
        if at >= 0:
            break
    if at < 0:
        raise InputError(
            f"{path}: an unfinished save or download: it begins as a zip file and has no directory at its end",
            hint="use an earlier checkpoint, or copy or download the file again",
        )
    end = tail_at + at
    disk, first_disk, here, count, length, start = struct.unpack_from("<4xHHHHLL", tail, at)
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (length, start):
        if end < 20:
            raise InputError(f"{path}: its zip directory is damaged")
        locator = read_at(path, stream, end - 20, 20)
        end = int.from_bytes(locator[8:16], "little")
        if locator[:4] != b"PK\x06\x07" or end + 56 > size:
            raise InputError(f"{path}: its zip64 directory is damaged")
        record = read_at(path, stream, end, 56)
        if record[:4] != b"PK\x06\x06":
            raise InputError(f"{path}: its zip64 directory is damaged")
        disk, first_disk, here, count, length, start = struct.unpack_from("<16xLLQQQQ", record)
    if disk or first_disk or here != count:
        raise InputError(f"{path}: is one part of a zip file in several parts")
    if start + length > end:
        raise InputError(f"{path}: its zip directory lies outside the file: truncated or damaged")
    if length > MAX_DIRECTORY_BYTES:
        raise UnsafeError(f"{path}: its zip directory has {length:,} bytes; {MAX_DIRECTORY_BYTES:,} are the most read")
    return start, start + length, count


def _end_record(tail: bytes) -> int:
    """Where the record that ends a zip file begins in its last bytes, -1 where it does not."""
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + 22 > len(tail) or at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return at


def _zip64_fields(path: Path, extra: bytes, unpacked: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three fields, each taken from the zip64 extra field where it is saturated (APPNOTE 4.5.3)."""
    fields = [unpacked, packed, header]
    wanted = [index for index, value in enumerate(fields) if value == 0xFFFFFFFF]
    if wanted:
        at = 0
        while at + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, at)
            body = extra[at + 4 : at + 4 + length]
            if tag == 1 and len(body) >= 8 * len(wanted):
                for index, value in zip(wanted, struct.iter_unpack("<Q", body[: 8 * len(wanted)]), strict=True):
                    fields[index] = value[0]
                return fields[0], fields[1], fields[2]
            at += 4 + length
        raise InputError(f"{path}: its zip directory lacks the size of a record")
    return unpacked, packed, header


def _check_record(path: Path, name: str, flags: int, method: int, packed: int, unpacked: int) -> None:
    parts = name.replace("\\", "/").split("/")
    if not name or ".." in parts or name[0] in "/\\" or name[1:2] == ":" or "\0" in name:
        raise UnsafeError(f"{path}: record name {printable(name) or '(empty)'} leads out of the archive")
    if flags & 0x2041:
        raise InputError(f"{path}: record {printable(name)} is encrypted; torch.save never does that")
    if method:
        if unpacked > 100 * packed + 4096:
            raise UnsafeError(f"{path}: record {printable(name)} would expand {packed:,} bytes to {unpacked:,}")
        if parts[1:2] == ["code"]:  # the only records that torch compresses
            raise _torchscript(path)
        raise InputError(
            f"{path}: record {printable(name)} is compressed; torch.save stores its records as they are",
            hint="the file was packed again. Unpack it and pack it without compression (zip -0), or copy the original",
        )
    if packed != unpacked:
        raise InputError(f"{path}: record {printable(name)} has two sizes, {packed:,} and {unpacked:,}")


def _torchscript(path: Path) -> UnsupportedError:
    hint = "Save the weights alone: torch.save(module.state_dict(), FILE)"
    return UnsupportedError(f"{path}: is a TorchScript program, not a state dict", hint=hint)


def _data_offset(path: Path, stream: RawIOBase, header: int, name: bytes) -> int:
    local = read_at(path, stream, header, 30 + len(name))
    if local[:4] != b"PK\x03\x04" or local[30:] != name or local[26:28] != len(name).to_bytes(2, "little"):
        raise InputError(f"{path}: the header of record {printable(name.decode('latin-1'))} is damaged or not its own")
    flags, method = struct.unpack_from("<6xHH", local)
    if method or flags & 0x2041:
        raise InputError(f"{path}: the two headers of record {printable(name.decode('latin-1'))} disagree")
    return header + 30 + len(name) + int.from_bytes(local[28:30], "little")


def read_at(path: Path, stream: RawIOBase, offset: int, length: int) -> bytes:
    if offset >> 63:
        raise InputError(f"{path}: truncated or damaged: it points to byte {offset}")
    stream.seek(offset)
    data = stream.read(length)
    while len(data) < length:  # an unbuffered read may stop early, at 2 GiB for one
        more = stream.read(length - len(data))
        if not more:
            found = f"{length:,} bytes expected at {offset:,}, {len(data):,} found"
            raise InputError(f"{path}: truncated or damaged: {found}")
        data += more
    return data
