"""A conversion as a value: every output tensor with its source bytes, its ops and its place in the output.

Everything else falls out of it: the dry run prints it, the executor streams it, verification replays it, its
hash tells whether an interrupted run can be taken up again, and conversion.json records it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Any

from llava_convert.core.tensors import Stripe, stripes_of
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass
from llava_convert.engine.shards import PlannedTensor, Shard, shards_of
from llava_convert.model.target import Target
from llava_convert.storage.remote.mounts import address_of


@dataclass(frozen=True, repr=False)
class Plan:
    """All of a conversion."""

    layout: str
    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    indexes: Mapping[str, bytes]
    tags: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(len(shard.tensors) for shard in self.shards)
        return f"Plan({self.layout}, {count} tensors in {len(self.shards)} files, {self.bytes_written} bytes)"

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(t for shard in self.shards for t in shard.tensors)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every file by its name, known before a byte is written."""
        small = {name: len(data) for name, data in (*self.files.items(), *self.indexes.items())}
        return {shard.name: shard.size for shard in self.shards} | small

    @property
    def bytes_written(self) -> int:
        return sum(self.sizes.values())

    @cached_property
    def batches(self) -> tuple[tuple[Shard, ...], ...]:
        """The shards that are written together, since they hold the same tensors in several types; else each alone."""
        batches: list[list[Shard]] = []
        held: list[set[str]] = []
        for shard in self.shards:
            names = {t.canonical for t in shard.tensors}
            kin = [i for i, others in enumerate(held) if others & names]
            place = kin[0] if kin else len(batches)
            group = [one for i in kin for one in batches[i]]
            names = names.union(*(held[i] for i in kin))
            for i in reversed(kin):
                del batches[i], held[i]
            batches.insert(place, [*group, shard])
            held.insert(place, names)
        return tuple(map(tuple, batches))

    def share(self, number: int, count: int) -> tuple[Shard, ...]:
        """Share `number`, from 1, of `count` about equal ones; empty where there are more shares than shards.

        The largest goes first to whoever has least, so that it depends on the plan alone who gets what.
        """
        loads = [0] * count
        mine = set()
        for shard in sorted(self.shards, key=lambda one: (-one.size, one.name)):
            least = min(range(count), key=lambda i: (loads[i], i))
            loads[least] += shard.size
            if least == number - 1:
                mine.add(shard.name)
        return tuple(shard for shard in self.shards if shard.name in mine)

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
            _add(digest, shard)
        for name, data in sorted({**self.files, **self.indexes}.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return digest.hexdigest()


def shard_hash(shard: Shard) -> str:
    """sha256 over what one file will be and from where."""
    digest = hashlib.sha256()
    _add(digest, shard)
    return digest.hexdigest()


def _add(digest: Any, shard: Shard) -> None:
    digest.update(f"{shard.name}\0{shard.size}\0".encode() + shard.header)
    for _, piece in shard.pieces:
        digest.update(piece)
    for t in shard.tensors:
        stored = [t.source, *(i for op in t.ops for i in op.inputs())]
        places = [[s.dtype, s.shape, s.strides, *map(_place, stripes_of(s.extents))] for s in stored]
        digest.update(json.dumps([t.describe(), places]).encode())


def _place(stripe: Stripe) -> list[Any]:
    """Where bytes are, in words that mean the same to the next run: a remote file by its address."""
    places = [[address_of(e.path) or str(e.path), e.offset, e.length, step] for e, step in stripe.pieces]
    return places[0][:3] if stripe.rounds == 1 and len(places) == 1 else [stripe.rounds, *places]


def make_plan(target: Target, *, tags: Mapping[str, Any] | None = None) -> Plan:
    """Settle shards, headers, offsets and indexes of a target. Reads nothing."""
    shards: list[Shard] = []
    indexes: dict[str, bytes] = {}
    encoded: dict[int, bytes] = {}  # vocabularies of GGUF: one for the files of all types
    for files in target.sets:
        made, index = shards_of(files, encoded)
        shards += made
        indexes |= {name: to_json(content) for name, content in index.items()}
    return Plan(target.layout, tuple(shards), dict(target.files), indexes, tags or {})
