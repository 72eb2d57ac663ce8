"""torch.distributed.checkpoint: `.metadata`, a pickle that says where each part of each tensor lies, and `*.distcp`.

A part is what torch.save writes of one tensor, at an offset of a file (torch 2.13, distributed/checkpoint:
metadata.py, filesystem.py `_write_item`). The pickle names eleven classes of torch, each a record without code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import RawIOBase
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.tensors import MAX_TENSORS, Extent, StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.distributed.chunks import Budget, Chunk, put_together
from llava_convert.storage.files import (
    open_regular,
    read_file,
    relative_name,
    require_inside,
    size_of,
    will_read,
)
from llava_convert.storage.pickle import machine
from llava_convert.storage.pickle.machine import MAX_PICKLE_BYTES, Inert
from llava_convert.storage.torch.tensors import DTYPES, is_quiet
from llava_convert.storage.torch.zip import TAIL, read_zip

METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint."
_HEAD = 2048  # bytes, in which the pickle of a tensor lies
# What trainers call the model's state, and the states beside it.
_MODEL = ("model", "module", "state_dict")
_BESIDE = ("optim", "optimizer", "optimizers", "optimizer_states", "lr_scheduler", "dataloader", "train_state")
# Beside its own classes: what `storage_meta` says of the place where it was saved, and of a tensor's layout.
_RECORDS = ("pathlib.PosixPath", "pathlib.WindowsPath", "torch.serialization._get_layout")
_MEND = "get the whole folder again, of one save"

Offsets = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Classic:
    """The model's tensors by name; `left` counts the entries that are not the model's."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    left: int
    stubs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part's file of torch lies."""

    path: Path
    offset: int
    length: int


def read_classic(folder: Path) -> Classic:
    """The tensors of a checkpoint by its metadata and the headers of its parts; optimizer states are left out.

    Raises InputError for files that are missing or cut and for metadata that contradict them, UnsafeError for a pickle
    that would run code and for names that leave the folder, UnsupportedError for parts that were transformed.
    """
    where = folder / METADATA
    loaded = machine.load(read_file(require_inside(folder, METADATA), MAX_PICKLE_BYTES), path=where, quiet=_is_quiet)
    state = _state(loaded.root, "Metadata", where)
    entries, planner = _dict(state, "state_dict_metadata", where), state.get("planner_data")
    if len(entries) > 4 * MAX_TENSORS:
        raise UnsafeError(f"{where}: {len(entries):,} entries, more than any checkpoint")
    names = _names(entries, planner if isinstance(planner, dict) else {})
    wanted = {name: _wanted(entries[entry], where, entry) for entry, name in names.items()}
    dtypes = {name: _dtype(entries[entry]) for entry, name in names.items()}
    places = _places(folder, _dict(state, "storage_data", where), frozenset(names), where)
    parts: dict[tuple[str, Offsets], _Place] = {}
    for entry, name in names.items():
        for offsets, _ in wanted[name][1]:
            if (entry, offsets) not in places:
                raise InputError(
                    f"{where}: does not say which file holds {printable(entry)} at {list(offsets)}", hint=_MEND
                )
            parts[name, offsets] = places[entry, offsets]
    stored = _stored(parts)
    tensors: dict[str, StoredTensor] = {}
    budget = Budget()
    for name, (shape, chunks) in wanted.items():
        for offsets, sizes in chunks:
            found = stored[name, offsets]
            if found.shape != sizes:
                raise InputError(
                    f"{where}: {printable(name)} at {list(offsets)}: {list(sizes)} by the metadata, "
                    f"{list(found.shape)} in {parts[name, offsets].path.name}",
                    hint=_MEND,
                )
            if dtypes[name] is not None and found.dtype != dtypes[name]:
                raise InputError(
                    f"{where}: {printable(name)} at {list(offsets)}: {dtypes[name]} by the metadata, "
                    f"{found.dtype} in {parts[name, offsets].path.name}",
                    hint=_MEND,
                )
        held = [Chunk(offsets, stored[name, offsets]) for offsets, _ in chunks]
        tensors[name] = put_together(name, shape, held, folder, budget)
    if not tensors:
        raise InputError(f"{where}: names no tensor of a model")
    files = tuple(sorted({place.path for place in parts.values()}))
    return Classic(tensors, (where, *files), len(entries) - len(names), loaded.stubs)


def _is_quiet(name: str) -> bool:
    return is_quiet(name) or name.startswith(_CLASSES) or name in _RECORDS


def _state(value: Any, kind: str, where: Path) -> Mapping[str, Any]:
    """The attributes of a record of that class."""
    if type(value) is not Inert or value.name.rpartition(".")[2] != kind or not isinstance(value.state, dict):
        raise InputError(f"{where}: holds no {kind} where one is expected: torch did not write it, or not to its end")
    return value.state


def _dict(state: Mapping[str, Any], key: str, where: Path) -> dict[Any, Any]:
    found = state.get(key)
    if not isinstance(found, dict):
        raise InputError(f"{where}: has no {key}")
    return found


def _names(entries: Mapping[Any, Any], planner: Mapping[Any, Any]) -> dict[str, str]:
    """The model's tensors: what an entry's name is in the model.

    Where the state was nested ({"model": …, "optimizer": …}), torch keeps each entry's path.
    """
    tensors = [name for name, entry in entries.items() if isinstance(name, str) and _is_tensor(entry)]
    paths = {name: path for name in tensors if (path := planner.get(name)) and isinstance(path, tuple)}
    roots = {str(path[0]) for path in paths.values() if len(path) > 1}
    root = next((root for root in _MODEL if root in roots), None)
    found: dict[str, str] = {}
    for name in tensors:
        path = paths.get(name, (name,))
        if root is not None and len(path) > 1 and path[0] == root:
            found[name] = ".".join(map(str, path[1:]))
        elif root is None and name.partition(".")[0] not in _BESIDE:
            found[name] = name
    return found


def _is_tensor(entry: Any) -> bool:
    return type(entry) is Inert and entry.name.endswith(".TensorStorageMetadata")


def _wanted(entry: Any, where: Path, name: str) -> tuple[Offsets, list[tuple[Offsets, Offsets]]]:
    """A tensor's shape, and of each of its parts offsets and sizes."""
    state = _state(entry, "TensorStorageMetadata", where)
    chunks = state.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise InputError(f"{where}: {printable(name)} has no parts")
    states = [_state(chunk, "ChunkStorageMetadata", where) for chunk in chunks]
    found = [(_sizes(s.get("offsets"), where, name), _sizes(s.get("sizes"), where, name)) for s in states]
    return _sizes(state.get("size"), where, name), found


def _dtype(entry: Any) -> str | None:
    """The type that a tensor's properties state first (`TensorProperties.__getstate__`); None where they do not."""
    properties = entry.state.get("properties")
    state = properties.state if type(properties) is Inert else None
    first = state[0] if isinstance(state, tuple) and state else None
    return DTYPES.get(first.name.removeprefix("torch.")) if type(first) is Inert else None


def _sizes(value: Any, where: Path, name: str) -> Offsets:
    if not isinstance(value, tuple) or len(value) > 64 or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise InputError(f"{where}: {printable(name)} has no sound sizes")
    return value


def _places(
    folder: Path, storage: Mapping[Any, Any], wanted: frozenset[str], where: Path
) -> dict[tuple[str, Offsets], _Place]:
    found: dict[tuple[str, Offsets], _Place] = {}
    paths: dict[str, Path] = {}
    for index, info in storage.items():
        key = _state(index, "MetadataIndex", where)
        name = key.get("fqn")
        if name not in wanted:
            continue
        place = _state(info, "_StorageInfo", where)
        file, offset, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if place.get("transform_descriptors"):
            raise UnsupportedError(
                f"{where}: the parts were transformed when they were saved ({printable(name)})",
                hint="save the model without transforms",
            )
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise InputError(f"{where}: {printable(name)} has no sound place")
        if file not in paths:
            plain = relative_name(file) if isinstance(file, str) else None
            if plain is None:
                raise UnsafeError(
                    f"{where}: puts {printable(name)} into '{printable(file)}', which is not a file of this folder",
                    hint="torch writes no such name: get the checkpoint from where it was saved",
                )
            paths[str(file)] = require_inside(folder, plain)
        offsets = _sizes(key.get("offset"), where, str(name))
        found[str(name), offsets] = _Place(paths[str(file)], offset, length)
    return found


def _stored(parts: Mapping[tuple[str, Offsets], _Place]) -> dict[tuple[str, Offsets], StoredTensor]:
    """Each part's tensor, found in its place; every file is opened once."""
    by_file: dict[Path, list[tuple[tuple[str, Offsets], _Place]]] = {}
    for key, place in parts.items():
        by_file.setdefault(place.path, []).append((key, place))
    found: dict[tuple[str, Offsets], StoredTensor] = {}
    for path, held in sorted(by_file.items()):
        with open_regular(path) as stream:
            size = size_of(stream)
            for (name, _), place in held:
                if place.offset + place.length > size:
                    raise InputError(
                        f"{path}: truncated: {printable(name)} ends at byte {place.offset + place.length:,} "
                        f"of {size:,}",
                        hint=_MEND,
                    )
            will_read(stream, list(_ends(place for _, place in held)))
            for key, place in held:
                found[key] = _part(stream, place, key[0])
    return found


def _ends(places: Iterable[_Place]) -> Iterable[tuple[int, int]]:
    """The beginnings and the ends of parts, where their pickles and directories are."""
    for place in places:
        yield place.offset, min(_HEAD, place.length)
        tail = min(TAIL, place.length)
        yield place.offset + place.length - tail, tail


def _part(stream: RawIOBase, place: _Place, name: str) -> StoredTensor:
    tensor = read_zip(place.path, _Window(stream, place.offset, place.length), place.length).root
    if not isinstance(tensor, StoredTensor):
        raise InputError(f"{place.path}: holds no tensor at byte {place.offset:,}, where {printable(name)} should be")
    moved = tuple(Extent(e.path, place.offset + e.offset, e.length) for e in tensor.extents)
    return replace(tensor, name=name, extents=moved)


class _Window(RawIOBase):
    """A range of a stream, as if it were the whole."""

    def __init__(self, stream: RawIOBase, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        count = max(0, min(size, self._length - self._at))
        self._stream.seek(self._start + self._at)
        data = self._stream.read(count) or b""
        self._at += len(data)
        return data
