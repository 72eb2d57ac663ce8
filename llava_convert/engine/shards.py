"""File sets settled into shards: which tensor lies where in which file, known before a byte is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import accumulate
from math import prod
from typing import Any

from llava_convert.core.tensors import StoredTensor, nbytes_of
from llava_convert.core.values import dataclass
from llava_convert.model.target import FileSet, Output, _groups, part_names, shape_of
from llava_convert.ops.base import Op
from llava_convert.ops.join import Join, Part, row_bytes
from llava_convert.storage.gguf.file import Typed, encode_gguf
from llava_convert.storage.safetensors import encode_header
from llava_convert.storage.torch.write import plan_torch


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: `offset` is where its bytes start in its `shard`.

    A member of a join is one too: `place` says which rows of the tensor at `offset` are its own.
    """

    name: str
    canonical: str
    source: StoredTensor
    origin: str
    ops: tuple[Op, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    shard: str = ""
    place: Part | None = None

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, prod(self.shape))

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are the source's bytes, in one order."""
        return not self.ops and self.source.strides is None

    @property
    def pieces(self) -> tuple[PlannedTensor, ...]:
        """The members of a join, each with its place; itself where nothing is joined."""
        if not self.ops or not isinstance(join := self.ops[-1], Join):
            return (self,)
        chains = [(self.source, self.ops[:-1]), *((one.tensor, one.ops) for one in join.others)]
        return tuple(
            replace(self, source=source, ops=ops, shape=(part.groups * part.rows, *self.shape[1:]), place=part)
            for (source, ops), part in zip(chains, join.parts, strict=True)
        )

    def spans(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Where bytes go: for those from `start` on, their place in the tensor at `offset`, and how many lie there."""
        if self.place is None:
            yield start, length
            return
        row = row_bytes(self.dtype, self.shape)
        own, whole, first = self.place.rows * row, self.place.of * row, self.place.start * row
        while length > 0:
            group, inside = divmod(start, own)
            take = min(own - inside, length)
            yield group * whole + first + inside, take
            start, length = start + take, length - take

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "ops": [op.describe() for op in self.ops],
        }


@dataclass(frozen=True)
class Shard:
    """One file of tensors, header and offsets settled.

    `pieces` are further bytes that are known beforehand, by their places; `checks` the places which take the CRC-32 of
    a tensor's bytes, by its name.
    """

    name: str
    header: bytes
    size: int
    tensors: tuple[PlannedTensor, ...]
    container: str = "safetensors"
    pieces: tuple[tuple[int, bytes], ...] = ()
    checks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def shards_of(files: FileSet, encoded: dict[int, bytes]) -> tuple[list[Shard], dict[str, Any]]:
    """The shards of a file set, and its index by name where it has one. `encoded`: see `encode_gguf`."""
    prefix = f"{files.folder}/" if files.folder else ""
    if files.container == "torch":
        return [_torch_shard(part_names(files, 1)[0], files)], {}
    groups = _groups(files)
    shards = []
    for number, (name, group) in enumerate(zip(part_names(files, len(groups)), groups, strict=True), 1):
        if files.container == "gguf":
            shards.append(_gguf_shard(name, group, files, number - 1, len(groups), encoded))
        else:
            shards.append(_safetensors_shard(name, group))
    if len(shards) < 2 or files.container == "gguf":
        return shards, {}
    total = sum(t.nbytes for shard in shards for t in shard.tensors)
    where = {t.name: shard.name.removeprefix(prefix) for shard in shards for t in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": {name: where[name] for name in sorted(where)}}
    return shards, {f"{prefix}{files.stem}.safetensors.index.json": index}


def _torch_shard(name: str, files: FileSet) -> Shard:
    """A file of torch.save: the headers of a zip file stand between the tensors, and its directory at the end."""
    infos = [(o.name, o.dtype, shape_of(o)) for o in files.outputs]
    made = plan_torch(infos, files.around, files.key)
    (_, header), *pieces = made.pieces
    tensors = _place(name, files.outputs, made.offsets)
    return Shard(name, header, made.size, tensors, "torch", tuple(pieces), made.checks)


def _gguf_shard(
    name: str, group: Sequence[Output], files: FileSet, number: int, count: int, encoded: dict[int, bytes]
) -> Shard:
    """A GGUF file, or part `number` of `count`: the first holds the metadata, and each says which it is.

    Keys and their types are those of llama.cpp's gguf-split and gguf-py 0.19 (`GGUFWriter.add_shard_kv_data`).
    """
    metadata = dict(files.metadata) if number == 0 else {}
    if count > 1:
        metadata["split.no"] = Typed("u16", number)
        metadata["split.count"] = Typed("u16", count)
        metadata["split.tensors.count"] = Typed("i32", len(files.outputs))
    header = encode_gguf(metadata, [(o.name, o.dtype, shape_of(o)) for o in group], encoded=encoded)
    first, *rest = header.pieces
    places = accumulate(map(len, header.pieces))
    pieces = tuple(zip(places, rest, strict=False))
    return Shard(name, first, header.size, _place(name, group, header.offsets), "gguf", pieces)


def _safetensors_shard(name: str, group: Sequence[Output]) -> Shard:
    infos = [(o.name, o.dtype, shape_of(o)) for o in group]
    header = encode_header(infos)
    wanted = _alignment(group, header.offsets, len(header.data))
    if wanted is not None:
        header = encode_header(infos, data_start_mod=wanted)
    by_name = {o.name: o for o in group}
    return Shard(name, header.data, header.size, _place(name, [by_name[n] for n in header.order], header.offsets))


def _alignment(group: Sequence[Output], offsets: Mapping[str, int], data_start: int) -> int | None:
    """The data start (mod 4096) at which most copied bytes lie as they do in the source.

    Congruent runs can be cloned by a reflink filesystem and copied fastest by the others.
    """
    weights: dict[int, int] = {}
    for output in group:
        source = output.recipe.tensor
        if not output.ops and len(source.extents) == 1:
            wanted = (source.extents[0].offset - (offsets[output.name] - data_start)) % 4096
            if wanted % 8 == 0:
                weights[wanted] = weights.get(wanted, 0) + source.nbytes
    return max(weights, key=lambda mod: (weights[mod], -mod)) if weights else None


def _place(shard: str, outputs: Sequence[Output], offsets: Mapping[str, int]) -> tuple[PlannedTensor, ...]:
    return tuple(
        PlannedTensor(
            name=o.name,
            canonical=o.canonical,
            source=o.recipe.tensor,
            origin=o.recipe.origin,
            ops=o.ops,
            dtype=o.dtype,
            shape=shape_of(o),
            offset=offsets[o.name],
            shard=shard,
        )
        for o in outputs
    )
