"""Reads what torch.save writes, by its headers: the tree of the pickle, and where each tensor's bytes are.

Neither torch nor the classes that a file names are imported; no weight is read. Two forms: the zip of torch >= 1.6
(`<root>/data.pkl`, `<root>/data/<key>` stored uncompressed, `<root>/byteorder`; caffe2/serialize/inline_container.h)
and the older sequence of pickles (`_legacy_load` in torch/serialization.py).
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from llava_convert.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.spec import DTYPE_BITS, Extent, StoredTensor
from llava_convert.storage import unpickle
from llava_convert.storage.unpickle import Inert, Malformed, PickleEnds, shown

MAX_DIRECTORY_BYTES = 64 << 20  # about 600,000 records
MAX_EXPANDED_BYTES = 64 << 30  # of one tensor that has more elements than its storage (stride 0)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# torch dtype -> the name in `spec`; torch/storage.py says which storage class stands for which.
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64", "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}  # fmt: skip
# Sound, but nothing here computes with them: their tensors become `OddTensor`. Bytes an element.
_ODD_STORAGES = {
    "ComplexDoubleStorage": 16, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
    "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
_ODD_REBUILDS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta (without data)",
    "torch._utils._rebuild_wrapper_subclass": "wrapper-subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "device",
    "torch._utils._rebuild_xla_tensor": "XLA",
    "torch._utils._rebuild_mlc_tensor": "MLC",
}
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_QUIET = frozenset(
    ["torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.device", "torch.layout"]
)


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What torch.save wrote. `root` is the tree (see unpickle.load) with StoredTensor and OddTensor as its tensors.

    `stubs` are the names of the globals that were read as inert; `byteorder` is always "little".
    """

    path: Path
    root: Any
    stubs: tuple[str, ...]
    byteorder: str


@dataclass(frozen=True, slots=True)
class OddTensor:
    """A tensor of a kind that is not read ("quantised", "torch.complex128", ...); no error until it is asked for."""

    kind: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A torch storage: `nbytes` at `offset` of `path`. `dtype` is None for a type outside `spec`."""

    path: Path
    type_name: str
    dtype: str | None
    item: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a file in its order; the wrappers taken off; the entries that are no tensors."""

    tensors: dict[str, StoredTensor]
    unwrapped: tuple[str, ...]
    ignored: tuple[str, ...]


def read_torch(path: Path) -> TorchFile:
    """The tree of a file that torch.save wrote, in either format, with every tensor located and none read.

    Raises InputError (not a regular file, truncated, corrupt, another format), UnsupportedError (TAR, TorchScript,
    big-endian), UnsafeError (code, bombs, names that leave the archive: fault rows 35, 36, 39).
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
            raise InputError(f"{path}: is {kind}, not a checkpoint file")
        with path.open("rb", buffering=0) as stream:
            head = stream.read(512)
            if head.startswith(b"PK"):
                return _read_zip(path, stream, info.st_size)
            _refuse_other_formats(path, head)
            return _read_legacy(path, stream, info.st_size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def state_dict(file: TorchFile) -> StateDict:
    """The weights of `file`: without its wrappers and prefixes, each told in `unwrapped` (fault row 43).

    Wrappers are the keys `state_dict`, `model` and `module`, taken off while no tensor lies beside them; prefixes are
    `module.` and `_orig_mod.`, taken off while every key has them. Both say so in `unwrapped` ("module", "module.").

    Raises InputError where there is no tensor, UnsupportedError for a whole pickled module or a tensor of an odd kind.
    """
    unwrapped: list[str] = []
    level = _entries(file.root)
    if level is None:
        raise UnsupportedError(
            f"{file.path}: holds {_describe(file.root)}, not a state dict",
            hint="Save the weights alone: torch.save(model.state_dict(), FILE)",
        )
    while not _holds_tensors(level) and len(unwrapped) < 4:  # objects may be cyclic
        inner = {key: _entries(level.get(key)) for key in ("state_dict", "model", "module")}
        key = next((key for key, entries in inner.items() if entries), None)
        if key is None:
            break
        unwrapped.append(key)
        level = inner[key] or {}
    names = {key: value for key, value in level.items() if isinstance(key, str)}
    tensors: dict[str, StoredTensor] = {}
    ignored = [key if isinstance(key, str) else f"<key of type {type(key).__name__}>" for key in level]
    ignored = [key for key in ignored if not isinstance(names.get(key), StoredTensor)]
    for key, value in names.items():
        if isinstance(value, OddTensor):
            raise UnsupportedError(f"{file.path}: tensor {shown(key)} is of a kind that is not read: {value.kind}")
        if isinstance(value, StoredTensor):
            tensors[key] = value
    if not tensors:
        raise InputError(
            f"{file.path}: holds no tensor where a state dict is expected; found {_describe(level)}",
            hint="Is it a checkpoint of weights, and was the model saved with it?",
        )
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) and key != p for key in tensors)), ""):
        tensors = {key[len(prefix) :]: tensor.renamed(key[len(prefix) :]) for key, tensor in tensors.items()}
        unwrapped.append(prefix)
    return StateDict(tensors, tuple(unwrapped), tuple(ignored))


def _holds_tensors(level: dict[Any, Any]) -> bool:
    return any(isinstance(value, StoredTensor | OddTensor) for value in level.values())


def _entries(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Inert) and value.args is not None:
        return value.mapping
    return value if isinstance(value, dict) else None


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = [shown(str(key)) if isinstance(key, str | int) else "…" for key in list(value)[:8]]
        return f"the keys {', '.join(keys)}" if keys else "an empty dict"
    return f"an object of {shown(value.name)}" if isinstance(value, Inert) else f"a {type(value).__name__}"


# -- other formats -------------------------------------------------------------------------------------------------


def _refuse_other_formats(path: Path, head: bytes) -> None:
    if not head:
        raise InputError(f"{path}: empty file", hint="The save or download did not finish: make it again.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights", hint="git lfs pull")
    if head.lstrip()[:1] in (b"<", b"{") and not head.startswith(b"\x80"):
        raise InputError(
            f"{path}: looks like a web page or an error message saved as weights", hint="Download the file again."
        )
    if head[257:262] == b"ustar":
        raise UnsupportedError(
            f"{path}: is in the TAR format of PyTorch before 0.4, which is not read",
            hint="If you trust the file, save it anew: python -c \"import torch; torch.save(torch.load('OLD', "
            "map_location='cpu', weights_only=False), 'NEW')\"",
        )
    if head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < 1 << 40:
        raise InputError(f"{path}: is a safetensors file under another name", hint="Rename it to end in .safetensors.")


# -- zip -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    length: int
    crc: int


def _read_zip(path: Path, stream: BinaryIO, size: int) -> TorchFile:
    records = _zip_records(path, stream, size)
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        found = "no data.pkl" if not roots else f"{len(roots)} files named data.pkl"
        raise InputError(f"{path}: a zip file with {found}: torch.save did not write it, or not to its end")
    (root,) = roots
    if f"{root}/constants.pkl" in records:
        raise _torchscript(path)
    order = records.get(f"{root}/byteorder")
    if order is not None and _read_at(path, stream, order.offset, min(order.length, 16)) != b"little":
        raise UnsupportedError(
            f"{path}: was saved on a big-endian machine, which is not read",
            hint="Save it anew with torch.serialization.set_default_load_endianness on a little-endian machine.",
        )
    pickled = records[f"{root}/data.pkl"]
    if pickled.length > unpickle.MAX_PICKLE_BYTES:
        most = unpickle.MAX_PICKLE_BYTES
        raise UnsafeError(f"{path}: data.pkl has {pickled.length:,} bytes; {most:,} are the most read")
    data = _read_at(path, stream, pickled.offset, pickled.length)
    # torch.serialization.set_crc32_options(False) writes 0 for "not computed".
    if pickled.crc and zlib.crc32(data) != pickled.crc:
        raise InputError(f"{path}: data.pkl is damaged (its CRC-32 does not match)")

    def persistent(pid: Any) -> Storage:
        type_name, key, numel = _storage_id(pid, 5)
        record = records.get(f"{root}/data/{key}")
        storage = _storage(path, type_name, numel, 0 if record is None else record.offset)
        if record is None:
            if not storage.nbytes:
                return storage
            raise InputError(f"{path}: storage {shown(key)} is missing: the file is incomplete")
        if record.length < storage.nbytes:
            raise InputError(
                f"{path}: storage {shown(key)} has {record.length:,} bytes where its tensors need {storage.nbytes:,}"
            )
        return storage

    loaded = unpickle.load(data, path=path, persistent=persistent, builders=_BUILDERS, quiet=_is_quiet)
    return TorchFile(path, loaded.root, loaded.stubs, "little")


def _zip_records(path: Path, stream: BinaryIO, size: int) -> dict[str, _Record]:
    """Every record of an archive, located by its *local* header (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14 to 4.3.16)."""
    start, end, count = _zip_directory(path, stream, size)
    directory = _read_at(path, stream, start, end - start)
    records: dict[str, _Record] = {}
    spans: list[tuple[int, int, str]] = []
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
            raise InputError(f"{path}: its zip directory holds a name that is no text") from None
        unpacked, packed, header = _zip64_fields(path, extra, unpacked, packed, header)
        _check_record(path, name, flags, method, packed, unpacked)
        if name in records:
            raise UnsafeError(f"{path}: has two records named {shown(name)}, so that readers may see different files")
        offset = _data_offset(path, stream, header, raw)
        if offset + packed > start:
            raise InputError(f"{path}: record {shown(name)} runs past the end of the data: truncated or damaged")
        records[name] = _Record(offset, packed, crc)
        spans.append((header, offset + packed, name))
    if len(records) != count:
        raise InputError(f"{path}: its zip directory tells {count} records and holds {len(records)}")
    spans.sort()
    for (_, before_end, before), (after_start, _, after) in pairwise(spans):
        if after_start < before_end:
            raise UnsafeError(f"{path}: records {shown(before)} and {shown(after)} overlap")
    return records


def _zip_directory(path: Path, stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start, end and number of entries of the central directory, zip64 or not."""
    tail_at = max(0, size - 65557)
    tail = _read_at(path, stream, tail_at, size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + 22 > len(tail) or at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise InputError(
            f"{path}: an unfinished save or download: it begins as a zip file and has no directory at its end",
            hint="Use an earlier checkpoint, or copy or download the file again.",
        )
    end = tail_at + at
    disk, first_disk, here, count, length, start = struct.unpack_from("<4xHHHHLL", tail, at)
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (length, start):
        if end < 20:
            raise InputError(f"{path}: its zip directory is damaged")
        locator = _read_at(path, stream, end - 20, 20)
        end = int.from_bytes(locator[8:16], "little")
        if locator[:4] != b"PK\x06\x07" or end + 56 > size:
            raise InputError(f"{path}: its zip64 directory is damaged")
        record = _read_at(path, stream, end, 56)
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
        raise UnsafeError(f"{path}: record name {shown(name) or '(empty)'} leads out of the archive")
    if flags & 0x2041:
        raise InputError(f"{path}: record {shown(name)} is encrypted; torch.save never does that")
    if method:
        if unpacked > 100 * packed + 4096:
            raise UnsafeError(f"{path}: record {shown(name)} would expand {packed:,} bytes to {unpacked:,}")
        if parts[1:2] == ["code"]:  # the only records that torch compresses
            raise _torchscript(path)
        raise InputError(
            f"{path}: record {shown(name)} is compressed; torch.save stores its records as they are",
            hint="The file was packed anew. Unpack it and pack it without compression (zip -0), or copy the original.",
        )
    if packed != unpacked:
        raise InputError(f"{path}: record {shown(name)} has two sizes, {packed:,} and {unpacked:,}")


def _torchscript(path: Path) -> UnsupportedError:
    hint = "Save the weights alone: torch.save(module.state_dict(), FILE)"
    return UnsupportedError(f"{path}: is a TorchScript program, not a state dict", hint=hint)


def _data_offset(path: Path, stream: BinaryIO, header: int, name: bytes) -> int:
    local = _read_at(path, stream, header, 30 + len(name))
    if local[:4] != b"PK\x03\x04" or local[30:] != name or local[26:28] != len(name).to_bytes(2, "little"):
        raise InputError(f"{path}: the header of record {shown(name.decode('latin-1'))} is damaged or not its own")
    flags, method = struct.unpack_from("<6xHH", local)
    if method or flags & 0x2041:
        raise InputError(f"{path}: the two headers of record {shown(name.decode('latin-1'))} disagree")
    return header + 30 + len(name) + int.from_bytes(local[28:30], "little")


def _read_at(path: Path, stream: BinaryIO, offset: int, length: int) -> bytes:
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


# -- legacy --------------------------------------------------------------------------------------------------------


def _read_legacy(path: Path, stream: BinaryIO, size: int) -> TorchFile:
    """Magic, protocol, system, object and storage keys as pickles; then for each key its length and its bytes.

    Where the bytes are is known only after the object's pickle, so that this is run twice: for lengths, for places.
    """
    window = 1 << 22
    while True:
        data = _read_at(path, stream, 0, min(size, window))
        try:
            return _parse_legacy(path, stream, size, data)
        except PickleEnds:
            if len(data) == size or window >= unpickle.MAX_PICKLE_BYTES:
                raise
            window *= 4


def _parse_legacy(path: Path, stream: BinaryIO, size: int, data: bytes) -> TorchFile:
    try:
        magic = unpickle.load(data, path=path)
    except InputError as error:
        if isinstance(error, PickleEnds) and data.startswith(b"\x80"):
            raise
        magic = None
    if magic is None or magic.root != _LEGACY_MAGIC:
        raise InputError(f"{path}: is no file of torch.save: neither a zip file nor the older form")
    protocol = unpickle.load(data, path=path, start=magic.end)
    if protocol.root != _LEGACY_PROTOCOL:
        raise InputError(f"{path}: is no file of torch.save: unknown version {shown(ascii(protocol.root)[:50])}")
    system = unpickle.load(data, path=path, start=protocol.end)
    if isinstance(system.root, dict) and system.root.get("little_endian") is False:
        raise UnsupportedError(f"{path}: was saved on a big-endian machine, which is not read")

    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def persistent(pid: Any) -> Any:
        if type(pid) is tuple and len(pid) == 4 and _ascii(pid[0]) == "module":
            return pid[1]  # the class of a pickled module, with its source text
        type_name, key, numel = _storage_id(pid, 6)
        storage = _storage(path, type_name, numel, places.get(key, 0))
        if not storage.item:
            raise UnsupportedError(f"{path}: storage {shown(key)} is of a type that is not known: {shown(type_name)}")
        first = storages.setdefault(key, storage)
        if storage.nbytes != first.nbytes:
            raise Malformed(f"storage {shown(key)} has two sizes")
        view = pid[5]
        if view is None:
            return storage
        _, offset, count = view
        if not all(type(n) is int and n >= 0 for n in (offset, count)) or offset + count > numel:
            raise Malformed(f"a view that lies outside storage {shown(key)}")
        moved = storage.offset + offset * storage.item
        return Storage(path, storage.type_name, storage.dtype, storage.item, moved, count * storage.item)

    def read_object() -> unpickle.Loaded:
        return unpickle.load(
            data, path=path, start=system.end, persistent=persistent, builders=_BUILDERS, quiet=_is_quiet
        )

    first = read_object()
    keys = unpickle.load(data, path=path, start=first.end)
    if not isinstance(keys.root, list) or set(storages) - {key for key in keys.root if isinstance(key, str)}:
        raise InputError(f"{path}: its list of storages lacks some that its tensors use")
    at = keys.end
    for key in keys.root:
        if not isinstance(key, str) or key not in storages or key in places:
            raise InputError(f"{path}: its list of storages names one that no tensor uses, or one twice")
        storage = storages[key]
        count = int.from_bytes(_read_at(path, stream, at, 8), "little")
        if count * storage.item != storage.nbytes:
            raise InputError(f"{path}: storage {shown(key)} tells {count:,} elements, its tensors another number")
        places[key] = at + 8
        at += 8 + storage.nbytes
        if at > size:
            raise InputError(f"{path}: truncated: storage {shown(key)} ends at byte {at:,} of {size:,}")
    second = read_object()
    return TorchFile(path, second.root, second.stubs, "little")


# -- storages and tensors ------------------------------------------------------------------------------------------


def _ascii(value: Any) -> Any:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _storage_id(pid: Any, length: int) -> tuple[str, str, int]:
    """Type name, key and element count of ("storage", type, key, location, count[, view])."""
    if type(pid) is not tuple or len(pid) != length or _ascii(pid[0]) != "storage":
        raise Malformed("a persistent id that is no storage")
    storage_type, key, numel = pid[1], _ascii(pid[2]), pid[4]
    if type(storage_type) is not Inert or storage_type.args is not None or type(key) is not str:
        raise Malformed("a storage without type or key")
    if type(numel) is not int or not 0 <= numel < 1 << 63:
        raise Malformed(f"storage {shown(key)} has no sound element count")
    return storage_type.name, key, numel


def _storage(path: Path, type_name: str, numel: int, offset: int) -> Storage:
    last = type_name.rpartition(".")[2]
    if _is_storage(type_name) and last in _STORAGES:
        dtype = _DTYPES[_STORAGES[last]]
        item = DTYPE_BITS[dtype] // 8
        return Storage(path, type_name, dtype, item, offset, numel * item)
    if _is_storage(type_name) and last in _ODD_STORAGES:
        item = _ODD_STORAGES[last]
        return Storage(path, type_name, None, item, offset, numel * item)
    return Storage(path, type_name, None, 0, offset, 0)  # of unknown size: its tensors are odd, nothing reads it


def _is_storage(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return module in ("torch", "torch.cuda", "torch.storage") and (last in _STORAGES or last in _ODD_STORAGES)


def _is_quiet(name: str) -> bool:
    return name in _QUIET or name in _ODD_REBUILDS or name.removeprefix("torch.") in _DTYPES or _is_storage(name)


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None) -> StoredTensor | OddTensor:
    """A tensor over a storage; offset and strides count elements, as torch's do."""
    if type(storage) is not Storage or type(size) not in (tuple, list) or type(stride) not in (tuple, list):
        raise Malformed("a tensor without storage, size or strides")
    if dtype is None:
        return OddTensor(storage.type_name)
    if len(size) != len(stride) or len(size) > 64:
        raise Malformed("a tensor whose size and strides differ in length")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (offset, *size, *stride)):
        raise Malformed("a tensor whose offset, size or stride is negative or no number")
    shape, strides = tuple(size), tuple(stride)
    item, numel = DTYPE_BITS[dtype] // 8, prod(shape)
    span = 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if numel else 0
    needed = (offset + span) * item if numel else 0
    if needed > storage.nbytes:
        raise Malformed(
            f"a tensor of shape {list(shape)} needs {needed:,} bytes of a storage that has {storage.nbytes:,}"
        )
    if numel > span and numel * item > MAX_EXPANDED_BYTES:
        raise UnsafeError(
            f"{storage.path}: a tensor of {span * item:,} bytes claims to be {numel * item:,} by repeating itself"
        )
    extent = Extent(storage.path, storage.offset + offset * item if numel else storage.offset, span * item)
    return StoredTensor("", dtype, shape, (extent,), None if _is_contiguous(shape, strides) else strides)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Row-major without gaps; as in torch, the strides of dimensions of length 1 do not matter."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if step != expected and 0 not in shape:
                return False
            expected *= length
    return True


def _rebuild_tensor(args: tuple[Any, ...]) -> Any:
    """`_rebuild_tensor(storage, offset, size, stride)` and v2, which adds requires_grad, hooks and metadata."""
    if len(args) not in (4, 6, 7):
        raise Malformed("a tensor with a wrong number of arguments")
    if len(args) == 7 and args[6]:
        return OddTensor("conjugated or negated view")
    storage = args[0]
    return _view(storage, args[1], args[2], args[3], storage.dtype if type(storage) is Storage else None)


def _rebuild_tensor_v3(args: tuple[Any, ...]) -> Any:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None): dtypes without a storage class."""
    if len(args) not in (7, 8) or type(args[6]) is not Inert:
        raise Malformed("a tensor without a dtype")
    if len(args) == 8 and args[7]:
        return OddTensor("conjugated or negated view")
    dtype = _DTYPES.get(args[6].name.removeprefix("torch."))
    return OddTensor(args[6].name) if dtype is None else _view(args[0], args[1], args[2], args[3], dtype)


def _rebuild_parameter(args: tuple[Any, ...]) -> Any:
    """(data, requires_grad, hooks[, state]): a Parameter is its data."""
    if len(args) not in (3, 4):
        raise Malformed("a parameter with a wrong number of arguments")
    return args[0]


def _rebuild_from_type(args: tuple[Any, ...]) -> Any:
    """(function, type, arguments, state): a subclass of Tensor, or a tensor with attributes."""
    function, _, inner, _ = args
    if type(function) is not Inert or function.args is not None or type(inner) is not tuple:
        raise Malformed("a tensor without a function that makes it")
    builder = _TENSOR_BUILDERS.get(function.name)
    return OddTensor(function.name) if builder is None else builder(inner)


def _odd(kind: str) -> Callable[[tuple[Any, ...]], OddTensor]:
    return lambda args: OddTensor(kind)


_TENSOR_BUILDERS: dict[str, unpickle.Builder] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    **{name: _odd(kind) for name, kind in _ODD_REBUILDS.items()},
}
_BUILDERS: dict[str, unpickle.Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
}
