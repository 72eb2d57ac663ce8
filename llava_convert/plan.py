"""A conversion as a value: every output tensor with its source bytes, its ops and its place in the output.

Everything else falls out of it: the dry run prints it, the executor streams it, verification replays it, its
hash tells whether an interrupted run can be taken up again, and conversion.json records it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from llava_convert.errors import UsageError
from llava_convert.model import Recipe
from llava_convert.ops import Cast, Op
from llava_convert.spec import DTYPE_BITS, StoredTensor
from llava_convert.storage.safetensors import encode_header

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
KEEP = "keep"


def parse_size(text: str) -> int:
    """`5GB` (10^9, as transformers counts), `500 MiB` or plain bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(Decimal(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", hint="write 5GB, 500MiB or keep")
    return size


@dataclass(frozen=True)
class Output:
    """One tensor that a target wants: its name on disk, its recipe, the dtype it is written in."""

    name: str
    canonical: str
    recipe: Recipe
    dtype: str

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.recipe.ops if self.recipe.dtype == self.dtype else (*self.recipe.ops, Cast(self.dtype))


@dataclass(frozen=True)
class FileSet:
    """Tensors which share one set of files: `<folder>/<stem>.safetensors`, or shards of it and an index.

    `limit` is the most bytes of tensors in a shard, or KEEP: shards then follow the source's. `container` is
    "safetensors", or "torch" for the one file whose reader calls torch.load.
    """

    outputs: tuple[Output, ...]
    folder: str = ""
    stem: str = "model"
    limit: int | str = KEEP
    container: str = "safetensors"


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
class PlannedTensor:
    """One output tensor: `offset` is where its bytes start in its shard."""

    name: str
    canonical: str
    source: StoredTensor
    origin: str
    ops: tuple[Op, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BITS[self.dtype] // 8

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are the source's bytes, in one order."""
        return not self.ops and self.source.strides is None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "ops": [op.describe() for op in self.ops],
        }


@dataclass(frozen=True)
class Shard:
    """One file of tensors, header and offsets settled."""

    name: str
    header: bytes
    size: int
    tensors: tuple[PlannedTensor, ...]
    container: str = "safetensors"


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

    @property
    def bytes_read(self) -> int:
        return sum(t.source.nbytes + sum(i.nbytes for op in t.ops for i in op.inputs()) for t in self.tensors)

    @cached_property
    def hash(self) -> str:
        """sha256 over what will be written and from where; equal plans write equal bytes."""
        digest = hashlib.sha256(json.dumps(self.tags, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.size}\0".encode() + shard.header)
            for t in shard.tensors:
                stored = [t.source, *(i for op in t.ops for i in op.inputs())]
                places = [[s.dtype, s.shape, *([str(e.path), e.offset, e.length] for e in s.extents)] for s in stored]
                digest.update(json.dumps([t.describe(), places, t.source.strides]).encode())
        for name, data in sorted({**self.files, **self.indexes}.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return digest.hexdigest()


def make_plan(target: Target, *, tags: Mapping[str, Any] | None = None) -> Plan:
    """Settle shards, headers, offsets and indexes of a target. Reads nothing."""
    shards: list[Shard] = []
    indexes: dict[str, bytes] = {}
    for files in target.sets:
        made, index = _shards(files)
        shards += made
        indexes.update(index)
    return Plan(target.layout, tuple(shards), dict(target.files), indexes, target.single_file, tags or {})


def _shards(files: FileSet) -> tuple[list[Shard], dict[str, bytes]]:
    groups = _by_source(files.outputs) if files.limit == KEEP else _by_size(files.outputs, int(files.limit))
    prefix = f"{files.folder}/" if files.folder else ""
    if files.container == "torch":
        return [Shard(f"{prefix}{files.stem}.bin", b"", 0, _place(files.outputs, {}), "torch")], {}
    shards = []
    for number, group in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        shards.append(_safetensors_shard(f"{prefix}{files.stem}{part}.safetensors", group))
    if len(shards) < 2:
        return shards, {}
    total = sum(t.nbytes for shard in shards for t in shard.tensors)
    where = {t.name: shard.name.removeprefix(prefix) for shard in shards for t in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": {name: where[name] for name in sorted(where)}}
    return shards, {f"{prefix}{files.stem}.safetensors.index.json": to_json(index)}


def _safetensors_shard(name: str, group: Sequence[Output]) -> Shard:
    infos = [(o.name, o.dtype, shape_of(o)) for o in group]
    header = encode_header(infos)
    wanted = _alignment(group, header.offsets, len(header.data))
    if wanted is not None:
        header = encode_header(infos, data_start_mod=wanted)
    by_name = {o.name: o for o in group}
    return Shard(name, header.data, header.size, _place([by_name[n] for n in header.order], header.offsets))


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


def _place(outputs: Sequence[Output], offsets: Mapping[str, int]) -> tuple[PlannedTensor, ...]:
    return tuple(
        PlannedTensor(
            o.name, o.canonical, o.recipe.tensor, o.recipe.origin, o.ops, o.dtype, shape_of(o), offsets.get(o.name, 0)
        )
        for o in outputs
    )


def shape_of(output: Output) -> tuple[int, ...]:
    return output.recipe.shape


def size_of(output: Output) -> int:
    count = 1
    for size in shape_of(output):
        count *= size
    return count * DTYPE_BITS[output.dtype] // 8


def _by_size(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Fill shards in module order up to `limit` bytes of tensors; a larger tensor gets a shard of its own."""
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        size = size_of(output)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += size
    return groups


def _by_source(outputs: Sequence[Output]) -> list[list[Output]]:
    """One shard for each source file, in the order in which the module order first meets them."""
    groups: dict[str, list[Output]] = {}
    for output in outputs:
        extents = output.recipe.tensor.extents
        groups.setdefault(str(extents[0].path) if extents else "", []).append(output)
    return list(groups.values())


def to_json(value: Any) -> bytes:
    """JSON as every config here is written: two spaces, UTF-8, a newline at the end."""
    return utf8(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def utf8(text: str) -> bytes:
    """Text with names of files in it, which need not be of the locale's encoding, or of any: then `�` stands there."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
