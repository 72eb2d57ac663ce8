"""One torch file for each rank, with the rank's shares of tensors: `model_world_size_N_rank_R.pt`, as verl leaves them.

Each share is a DTensor: its local tensor, the mesh of ranks, and by which dimension each axis of the mesh splits it
(torch 2.13, distributed/tensor: _api.py, placement_types.py). A split gives each rank the same number of rows, rounded
up, so that the last ranks may have fewer (`Shard._split_tensor`, as torch.chunk).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.storage.distributed.chunks import Budget, Chunk, put_together
from llava_convert.storage.files import require_inside
from llava_convert.storage.headers import Headers
from llava_convert.storage.pickle.machine import Inert
from llava_convert.storage.torch.tensors import LocalShard

_RANK = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_MEND = "get the files of every rank, of one save"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The whole tensors by name."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    stubs: tuple[str, ...]


def is_rank(name: str) -> bool:
    return _RANK.fullmatch(name) is not None


def read_ranks(folder: Path, names: Iterable[str], headers: Headers) -> Ranks:
    """The tensors of all ranks' files, put together by their meshes.

    Raises InputError where a rank's file is missing or its shares do not fit, UnsupportedError for tensors that are
    split in several ways along one dimension, or are sums of what ranks hold; what reading a torch file raises.
    """
    found = {name: match for name in names if (match := _RANK.fullmatch(name))}
    worlds = {int(match[1]) for match in found.values()}
    if len(worlds) != 1:
        raise InputError(
            f"{folder}: files of runs of {listed(sorted(map(str, worlds)))} ranks", hint="leave those of one save"
        )
    (world,) = worlds
    by_rank = {int(match[2]): name for name, match in found.items()}
    lacking = [f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world) if rank not in by_rank]
    if lacking:
        raise InputError(f"{folder}: {len(lacking)} of {world} ranks are missing: {listed(lacking)}", hint=_MEND)
    parts: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    paths = [require_inside(folder, by_rank[rank]) for rank in range(world)]
    stubs: set[str] = set()
    for rank, path in enumerate(paths):
        file = headers.torch(path)
        stubs |= set(file.stubs)
        if not isinstance(file.root, dict):
            raise InputError(f"{path}: holds no dict of tensors")
        for name, value in file.root.items():
            if not isinstance(name, str) or not isinstance(value, LocalShard | StoredTensor):
                continue
            shape, chunk = _chunk(name, value, rank, path)
            if shapes.setdefault(name, shape) != shape:
                raise InputError(
                    f"{path}: {printable(name)} is {list(shape)} there, elsewhere {list(shapes[name])}", hint=_MEND
                )
            parts.setdefault(name, []).append(chunk)
    if not parts:
        raise InputError(f"{folder}: its ranks hold no tensor")
    budget = Budget()
    tensors = {name: put_together(name, shapes[name], chunks, folder, budget) for name, chunks in parts.items()}
    return Ranks(tensors, tuple(paths), tuple(sorted(stubs)))


def _chunk(name: str, value: LocalShard | StoredTensor, rank: int, path: Path) -> tuple[tuple[int, ...], Chunk]:
    """The shape of the whole tensor, and this rank's part of it."""
    if isinstance(value, StoredTensor):
        return value.shape, Chunk((0,) * len(value.shape), value)
    told = f"{path}: {printable(name)}"
    sizes, coordinate = _mesh(value.mesh, rank, told)
    if len(value.placements) != len(sizes):
        raise InputError(f"{told}: is placed along {len(value.placements)} axes of a mesh that has {len(sizes)}")
    offsets, shape = [0] * len(value.shape), list(value.shape)
    for placement, size, at in zip(value.placements, sizes, coordinate, strict=True):
        kind, dim = _placement(placement, told)
        if kind == "Replicate":
            continue
        if kind != "Shard" or dim is None or not 0 <= dim < len(shape) or shape[dim] != value.shape[dim]:
            raise UnsupportedError(
                f"{told}: is split in a way that is not read ({printable(kind)})",
                hint="save a full state dict, and convert that",
            )
        share = -(-shape[dim] // size)
        offsets[dim] = min(at * share, shape[dim])
        shape[dim] = max(0, min(share, shape[dim] - offsets[dim]))
    if value.local.shape != tuple(shape):
        raise InputError(f"{told}: rank {rank} holds {list(value.local.shape)}, its part is {shape}", hint=_MEND)
    return value.shape, Chunk(tuple(offsets), value.local)


def _mesh(mesh: Any, rank: int, told: str) -> tuple[Sequence[int], Sequence[int]]:
    """How many ranks there are along each axis, and where this one stands.

    Of meshes with several axes the sizes stand in the layout (torch 2.9 and later) or in the shape of `mesh`.
    """
    state = _state(mesh)
    coordinate, sizes = state.get("_coordinate_on_dim"), _axes(state)
    if not sizes:
        raise UnsupportedError(f"{told}: its mesh of ranks is not known", hint="save a full state dict")
    if coordinate is None and len(sizes) == 1:
        coordinate = [rank]
    place = [at for at in coordinate if type(at) is int] if isinstance(coordinate, list | tuple) else []
    if len(place) != len(sizes) or not all(0 <= at < size for at, size in zip(place, sizes, strict=True)):
        raise InputError(f"{told}: its rank's place in the mesh is not sound", hint=_MEND)
    return sizes, place


def _axes(state: dict[Any, Any]) -> Sequence[int]:
    """The sizes of the axes of a mesh; none where they are not known."""
    for key in ("mesh", "_mesh"):
        if isinstance(held := state.get(key), StoredTensor):
            return held.shape
    inner = _state(state.get("_layout"))
    shapes: Any = inner.get("shape", inner.get("_shape"))  # one for all axes, before torch 2.13
    if isinstance(axes := inner.get("axes"), tuple | list):
        shapes = [_state(axis).get("shape") for axis in axes]
    sizes: list[int] = []
    for shape in shapes if isinstance(shapes, tuple | list) else (shapes,):
        lengths = shape if isinstance(shape, tuple) else (shape,)  # of an axis of one rank it is ()
        if not all(type(length) is int and length > 0 for length in lengths):
            return ()
        sizes.append(prod(lengths))
    return sizes


def _state(value: Any) -> dict[Any, Any]:
    """The attributes of an object that a pickle made."""
    return value.state if type(value) is Inert and isinstance(value.state, dict) else {}


def _placement(value: Any, told: str) -> tuple[str, int | None]:
    """The kind of a placement, and the dimension that it splits."""
    if type(value) is not Inert:
        raise InputError(f"{told}: has a placement that is not known")
    dim = _state(value).get("dim", value.args[0] if value.args else None)
    return value.name.rpartition(".")[2], dim if type(dim) is int else None
