"""A conversion as a value: every output tensor with its source bytes, its ops and its place in the output.

Everything else falls out of it: the dry run prints it, the executor streams it, verification replays it, its
hash tells whether an interrupted run can be taken up again, and conversion.json records it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from llava_convert.core.addresses import called
from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import Extent
from llava_convert.engine.shards import KEEP as KEEP
from llava_convert.engine.shards import FileSet as FileSet
from llava_convert.engine.shards import Output as Output
from llava_convert.engine.shards import PlannedTensor as PlannedTensor
from llava_convert.engine.shards import Shard as Shard
from llava_convert.engine.shards import shards_of

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """`5GB` (10^9, as transformers counts), `500 MiB` or plain bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(Decimal(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", hint="write 5GB, 500MiB or keep")
    return size


@dataclass(frozen=True)
class Target:
    """What a layout makes of a model: file sets of tensors, and files whose bytes are known now."""

    layout: str
    sets: tuple[FileSet, ...]
    files: Mapping[str, bytes]
    single_file: bool = False
    added_rows: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All of a conversion."""

    layout: str
    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    indexes: Mapping[str, bytes]
    single_file: bool = False
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(t for shard in self.shards for t in shard.tensors)

    @property
    def bytes_written(self) -> int:
        files = sum(map(len, self.files.values())) + sum(map(len, self.indexes.values()))
        return sum(shard.size for shard in self.shards) + files

    @cached_property
    def batches(self) -> tuple[tuple[Shard, ...], ...]:
        """The shards that are written together, since they hold the same tensors in several types; else each alone."""
        batches: list[list[Shard]] = []
        held: list[set[str]] = []
        for shard in self.shards:
            names = {t.canonical for t in shard.tensors} if shard.container != "torch" else set()
            kin = [i for i, others in enumerate(held) if others & names]
            place = kin[0] if kin else len(batches)
            group = [one for i in kin for one in batches[i]]
            names = names.union(*(held[i] for i in kin))
            for i in reversed(kin):
                del batches[i], held[i]
            batches.insert(place, [*group, shard])
            held.insert(place, names)
        return tuple(map(tuple, batches))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that are read; a source of several outputs is read once for a batch."""
        read = 0
        for batch in self.batches:
            tensors = [t for shard in batch for t in shard.tensors]
            sources = {t.source for t in tensors} | {i for t in tensors for op in t.ops for i in op.inputs()}
            read += sum(source.nbytes for source in sources)
        return read

    @cached_property
    def hash(self) -> str:
        """sha256 over what will be written and from where; equal plans write equal bytes."""
        digest = hashlib.sha256(json.dumps(self.tags, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.size}\0".encode() + shard.header)
            for t in shard.tensors:
                stored = [t.source, *(i for op in t.ops for i in op.inputs())]
                places = [[s.dtype, s.shape, *map(_place, s.extents)] for s in stored]
                digest.update(json.dumps([t.describe(), places, t.source.strides]).encode())
        for name, data in sorted({**self.files, **self.indexes}.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return digest.hexdigest()


def _place(extent: Extent) -> list[Any]:
    """Where bytes are, in words that mean the same to the next run: a remote file by its address."""
    return [called(extent.path), extent.offset, extent.length]


def make_plan(target: Target, *, tags: Mapping[str, Any] | None = None) -> Plan:
    """Settle shards, headers, offsets and indexes of a target. Reads nothing."""
    shards: list[Shard] = []
    indexes: dict[str, bytes] = {}
    for files in target.sets:
        made, index = shards_of(files)
        shards += made
        indexes |= {name: to_json(content) for name, content in index.items()}
    return Plan(target.layout, tuple(shards), dict(target.files), indexes, target.single_file, tags or {})


def to_json(value: Any) -> bytes:
    """JSON as every config here is written: two spaces, UTF-8, a newline at the end."""
    return utf8(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def utf8(text: str) -> bytes:
    """Text with names of files in it, which need not be of the locale's encoding, or of any: then `�` stands there."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
