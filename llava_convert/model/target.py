"""A target: the tensors that a layout wants, in which files, and the files whose bytes are known already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from decimal import Decimal
from math import prod
from typing import Any

from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import nbytes_of
from llava_convert.core.values import dataclass
from llava_convert.model.recipe import Recipe
from llava_convert.ops import steps
from llava_convert.ops.base import Op
from llava_convert.storage.gguf.values import Typed
from llava_convert.storage.torch.write import require_storage

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
    added_rows: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


KEEP = "keep"


@dataclass(frozen=True)
class Output:
    """One tensor that a target wants: its name on disk, its recipe, the dtype it is written in.

    `members` are the several canonical tensors that are joined in it.
    """

    name: str
    canonical: str
    recipe: Recipe
    dtype: str
    members: tuple[tuple[str, Recipe], ...] = ()

    @property
    def apart(self) -> tuple[Output, ...]:
        """The canonical tensors in it, each as an output of its own."""
        members = self.members or ((self.canonical, self.recipe),)
        return tuple(Output(self.name, name, recipe, self.dtype) for name, recipe in members)

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.recipe.then(*steps(self.recipe.dtype, self.dtype)).ops


@dataclass(frozen=True)
class FileSet:
    """Tensors which share one set of files: `<folder>/<stem>.safetensors`, or shards of it and an index.

    `limit` is the most bytes of tensors in a shard, None for one file, or KEEP: shards then follow the source's.
    `container` is "safetensors", "torch" for one file whose reader calls torch.load, or "gguf": its tensors keep
    the order given, `metadata` goes into the (first) file, and KEEP means one file, as llama.cpp's tools write. A file
    of torch holds the tensors alone, or has them under `key` beside what is in `around`. Raises UnsupportedError for a
    dtype which such a file cannot hold.
    """

    outputs: tuple[Output, ...]
    folder: str = ""
    stem: str = "model"
    limit: int | str | None = KEEP
    container: str = "safetensors"
    metadata: Mapping[str, Typed] = field(default_factory=dict)
    around: Mapping[str, Any] | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if self.container == "torch":
            for output in self.outputs:
                require_storage(output.name, output.dtype)


def part_names(files: FileSet, count: int | None = None) -> list[str]:
    """The names of a file set's shards, of which there are `count`."""
    count = len(_groups(files)) if count is None else count
    prefix = f"{files.folder}/" if files.folder else ""
    parts = [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)] if count > 1 else [""]
    suffix = files.container if files.container != "torch" else "bin" if files.around is None else "pth"
    return [f"{prefix}{files.stem}{part}.{suffix}" for part in parts]


def _groups(files: FileSet) -> list[list[Output]]:
    """The tensors of each shard."""
    if files.limit is None or (files.container == "gguf" and files.limit == KEEP):
        return [list(files.outputs)]
    return _by_source(files.outputs) if files.limit == KEEP else _by_size(files.outputs, int(files.limit))


def shape_of(output: Output) -> tuple[int, ...]:
    return output.recipe.shape


def size_of(output: Output) -> int:
    return nbytes_of(output.dtype, prod(shape_of(output)))


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
