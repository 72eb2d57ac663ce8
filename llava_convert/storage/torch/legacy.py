"""The older form of torch.save (torch < 1.6): a sequence of pickles, then the bytes of every storage.

Magic number, protocol, system, object and storage keys are pickles; for each key then follow its length and its bytes
(`_legacy_load` in torch/serialization.py).
"""

from __future__ import annotations

from dataclasses import replace
from io import RawIOBase
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.text import printable
from llava_convert.storage.pickle import machine
from llava_convert.storage.pickle.machine import Malformed, PickleEnds
from llava_convert.storage.torch.tensors import BUILDERS, Storage, as_ascii, is_quiet, storage_at, storage_id
from llava_convert.storage.torch.zip import read_at

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_HEADER_OPERATIONS = 1000  # torch writes about 30; these pickles are read anew for each window


def read_legacy(path: Path, stream: RawIOBase, size: int) -> machine.Loaded:
    """The tree of the object; of the file, no more is read than its pickles and the lengths between the storages."""
    window = 1 << 22
    while True:
        data = read_at(path, stream, 0, min(size, window))
        try:
            return _parse(path, stream, size, data)
        except PickleEnds:
            if len(data) == size:
                raise
            if window >= machine.MAX_PICKLE_BYTES:
                most = machine.MAX_PICKLE_BYTES
                raise UnsafeError(f"{path}: its pickles do not end within {most:,} bytes, the most read") from None
            window = min(window * 4, machine.MAX_PICKLE_BYTES)


def _parse(path: Path, stream: RawIOBase, size: int, data: bytes) -> machine.Loaded:
    try:
        magic = machine.load(data, path=path, operations=_HEADER_OPERATIONS)
    except InputError as error:
        if isinstance(error, PickleEnds) and data.startswith(b"\x80"):
            raise
        magic = None
    if magic is None or magic.root != _MAGIC:
        raise InputError(f"{path}: is not a file of torch.save: neither a zip file nor the older form")
    protocol = machine.load(data, path=path, start=magic.end, operations=_HEADER_OPERATIONS)
    if protocol.root != _PROTOCOL:
        found = printable(protocol.root) if type(protocol.root) is int else "that is no number"
        raise InputError(f"{path}: is not a file of torch.save: unknown version {found}")
    system = machine.load(data, path=path, start=protocol.end, operations=_HEADER_OPERATIONS)
    if isinstance(system.root, dict) and system.root.get("little_endian") is False:
        raise UnsupportedError(f"{path}: was saved on a big-endian machine, which is not read")

    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def persistent(pid: Any) -> Any:
        if type(pid) is tuple and len(pid) == 4 and as_ascii(pid[0]) == "module":
            return pid[1]  # the class of a pickled module, with its source text
        type_name, key, numel = storage_id(pid, 6)
        storage = storage_at(path, type_name, numel, places.get(key, 0))
        if not storage.item:
            raise UnsupportedError(
                f"{path}: storage {printable(key)} is of a type that is not known: {printable(type_name)}"
            )
        first = storages.setdefault(key, storage)
        if storage.nbytes != first.nbytes:
            raise Malformed(f"storage {printable(key)} has two sizes")
        view = pid[5]
        if view is None:
            return storage
        _, offset, count = view
        if not all(type(n) is int and n >= 0 for n in (offset, count)) or offset + count > numel:
            raise Malformed(f"a view that lies outside storage {printable(key)}")
        moved = storage.offset + offset * storage.item
        return replace(storage, offset=moved, nbytes=count * storage.item)

    def read_object() -> machine.Loaded:
        return machine.load(data, path=path, start=system.end, persistent=persistent, builders=BUILDERS, quiet=is_quiet)

    # Where the bytes are is known only after the object's pickle, hence it is read twice: for lengths, for places.
    keys = machine.load(data, path=path, start=read_object().end)
    if not isinstance(keys.root, list) or set(storages) - {key for key in keys.root if isinstance(key, str)}:
        raise InputError(f"{path}: its list of storages lacks some that its tensors use")
    at = keys.end
    for key in keys.root:
        if not isinstance(key, str) or key not in storages or key in places:
            raise InputError(f"{path}: its list of storages names one that no tensor uses, or one twice")
        storage = storages[key]
        count = int.from_bytes(read_at(path, stream, at, 8), "little")
        if count * storage.item != storage.nbytes:
            raise InputError(f"{path}: storage {printable(key)} tells {count:,} elements, its tensors another number")
        places[key] = at + 8
        at += 8 + storage.nbytes
        if at > size:
            raise InputError(f"{path}: truncated: storage {printable(key)} ends at byte {at:,} of {size:,}")
    return read_object()
