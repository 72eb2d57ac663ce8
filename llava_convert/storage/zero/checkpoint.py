"""Reads DeepSpeed's ZeRO checkpoints, which are folders, by their pickled indexes: no weight is read, no DeepSpeed.

Each rank left its share of the float32 master weights, as flat vectors, in an `*_optim_states.pt`; the shapes and names
that these are cut by are in `*_model_states.pt`. A tensor of the result is the list of its pieces, wherever they lie.
How it fits together: deepspeed 0.14.4, utils/zero_to_fp32.py, and runtime/engine.py `_save_checkpoint`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.core.tensors import DTYPE_BITS, TORCH_NAMES, Extent, StoredTensor
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.storage.torch.file import OddTensor
from llava_convert.storage.zero.folder import check_one_save, recognise, state_files, state_folder
from llava_convert.storage.zero.states import (
    MEND,
    ModelState,
    OptimState,
    Shape,
    plain,
    read_model_state,
    read_optim_state,
    two_saves,
)

__all__ = ["ZeroCheckpoint", "read_zero", "recognise"]

# A 70B model of 1,000 parameters on 1,024 ranks has a million pieces, of about 200 bytes each in memory.
MAX_PIECES = 2_000_000


@dataclass(frozen=True, slots=True)
class ZeroCheckpoint:
    """A folder's weights by name, in the order of the module; a tensor has as many extents as ranks hold some of it.

    `meta` is what mmengine saved beside them. `stage` is 0 where DeepSpeed ran without ZeRO; `ranks` is how many
    share the masters, 1 where there are none. `trained` are the names of the weights that were not frozen. `notes` and
    `warnings` are for the user; `stubs` as in TorchFile.
    """

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    meta: Mapping[Any, Any]
    stage: int
    ranks: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stubs: tuple[str, ...]
    trained: frozenset[str] = frozenset()


def read_zero(folder: Path) -> ZeroCheckpoint:
    """The weights of the ZeRO-1, 2 or 3 checkpoint in `folder`: float32 masters wherever these were saved.

    `folder` holds the files themselves, or `latest` and the folder that it names. Without `*_optim_states.pt` the
    16-bit weights of `module` are taken, and a warning says so.

    Raises InputError where a file is missing, files are of different saves, or one holds less than the shapes say
    (fault row 44); UnsupportedError for models split in other ways too; UnsafeError as `read_torch` does.
    """
    root = state_folder(folder)
    model_files, optim_files = state_files(root)
    models = [read_model_state(path) for path in model_files]
    shares = [read_optim_state(path) for path in optim_files]
    check_one_save(models, shares)
    head = models[0]
    notes: list[str] = []
    warnings: list[str] = []
    found = _frozen(models)
    if shares:
        if head.shapes is None:
            raise InputError(f"{printable(head.path)}: has no param_shapes to cut the optimizer states by", hint=MEND)
        _check_pieces(root, sum(map(len, head.shapes)), len(shares))
        cut = _cut_scattered if shares[0].stage == 3 else _cut_contiguous
        masters = cut(head.shapes, shares, head)
        found |= masters
        plural = "s" if len(shares) > 1 else ""
        notes.append(f"{_kinds(masters)} masters of {len(shares)} rank{plural}, ZeRO-{shares[0].stage}")
        warnings += _steps_apart(head, shares[0])
    tensors = _in_module_order(head, found, complete=bool(shares))
    if not shares:
        warnings.append(
            f"{printable(root.name)} has no optimizer states (*_optim_states.pt) and so no float32 masters: the "
            "weights "
            f"are the copies that training computed with ({_kinds(tensors)})"
        )
    return ZeroCheckpoint(
        tensors=tensors,
        files=(*model_files, *optim_files),
        meta=head.meta,
        stage=shares[0].stage if shares else head.stage,
        ranks=len(shares) or 1,
        notes=tuple(notes),
        warnings=tuple(warnings),
        stubs=tuple(
            sorted({stub for stubs in [s.stubs for s in models] + [s.stubs for s in shares] for stub in stubs})
        ),
        trained=frozenset(name for group in head.shapes or () for name in group),
    )


def _kinds(tensors: Mapping[str, StoredTensor]) -> str:
    return listed(sorted({TORCH_NAMES.get(tensor.dtype, tensor.dtype) for tensor in tensors.values()}))


def _steps_apart(model: ModelState, share: OptimState) -> list[str]:
    # Only a warning: an optimizer that was started anew on resumed weights counts from zero.
    if model.step is None or share.step is None or model.step == share.step:
        return []
    return [
        f"{model.path.name} is of step {model.step}, the optimizer states are of step {share.step}: they may be of two "
        "saves; the weights are those of the optimizer states"
    ]


# -- cutting -------------------------------------------------------------------------------------------------------


class _Flat:
    """Vectors of one dtype, end to end."""

    def __init__(self, vectors: Sequence[StoredTensor]) -> None:
        self.vectors = vectors
        self.ends = list(accumulate(vector.numel for vector in vectors))
        self.count = self.ends[-1] if self.ends else 0

    def cut(self, first: int, count: int) -> Iterator[Extent]:
        """Where elements `first` to `first + count` lie."""
        index = bisect_right(self.ends, first)
        while count:
            vector, end = self.vectors[index], self.ends[index]
            take = min(count, end - first)
            if take:
                item, extent = DTYPE_BITS[vector.dtype] // 8, vector.extents[0]
                yield Extent(extent.path, extent.offset + (first - end + vector.numel) * item, take * item)
            first, count, index = first + take, count - take, index + 1


def _cut_contiguous(
    shapes: Sequence[dict[str, Shape]], shares: Sequence[OptimState], head: ModelState
) -> dict[str, StoredTensor]:
    """ZeRO-1 and 2: a group's partitions in a row are its parameters in a row, with padding at the end only.

    The padding makes the group a multiple of twice the ranks (`nccl_start_alignment_factor`), so that all partitions
    are of one size; the last is saved without padding (stage_1_and_2.py `_get_groups_without_padding`), or with it
    (bf16_optimizer.py). What `group_paddings` says is not needed: nothing but padding follows the parameters.
    """
    ranks = len(shares)
    found: dict[str, StoredTensor] = {}
    for share in shares:
        if len(share.vectors) != len(shapes):
            raise two_saves(
                share.path, f"has {len(share.vectors)} groups of parameters where {head.path.name} has {len(shapes)}"
            )
    for index, group in enumerate(shapes):
        vectors = [share.vectors[index] for share in shares]
        wanted = sum(map(prod, group.values()))
        size = max(-(-wanted // ranks), *(vector.numel for vector in vectors))
        for rank, (share, vector) in enumerate(zip(shares, vectors, strict=True)):
            _check_count(share, vector.numel, min(size, max(0, wanted - rank * size)), head)
        if size * ranks > -(-wanted // (2 * ranks)) * 2 * ranks:
            raise two_saves(head.path, f"its shapes need {wanted:,} elements, {ranks} ranks hold {size * ranks:,}")
        dtype = _dtype((share.path, share.vectors[index]) for share in shares)
        flat, at = _Flat(vectors), 0
        for name, shape in group.items():
            _check_shape(head, name, shape)
            found[name] = StoredTensor(name, dtype, shape, tuple(flat.cut(at, prod(shape))))
            at += prod(shape)
    return found


def _cut_scattered(
    shapes: Sequence[dict[str, Shape]], shares: Sequence[OptimState], head: ModelState
) -> dict[str, StoredTensor]:
    """ZeRO-3: every rank holds an equal part of each parameter, rounded up (partition_parameters.py `_aligned_size`).

    The vectors of a rank, one for each `sub_group_size` elements, are one vector in pieces.
    """
    every = {name: shape for group in shapes for name, shape in group.items()}
    wanted = sum(_part(shape, len(shares)) for shape in every.values())
    flats = [_Flat(share.vectors) for share in shares]
    for share, flat in zip(shares, flats, strict=True):
        _check_count(share, flat.count, wanted, head)
        if flat.count > wanted:
            raise two_saves(share.path, f"has {flat.count:,} elements, the shapes in {head.path.name} need {wanted:,}")
    dtype = _dtype((share.path, vector) for share in shares for vector in share.vectors)
    found: dict[str, StoredTensor] = {}
    at = 0
    for name, shape in every.items():
        _check_shape(head, name, shape)
        found[name] = StoredTensor(name, dtype, shape, _parts(flats, at, shape))
        at += _part(shape, len(shares))
    return found


def _part(shape: Shape, ranks: int) -> int:
    return -(-prod(shape) // ranks)


def _parts(flats: Sequence[_Flat], at: int, shape: Shape) -> tuple[Extent, ...]:
    """The pieces of a tensor whose part of each rank begins at element `at`; the last parts may be cut short."""
    part, numel = _part(shape, len(flats)), prod(shape)
    return tuple(
        extent for rank, flat in enumerate(flats) for extent in flat.cut(at, min(part, max(0, numel - rank * part)))
    )


def _frozen(models: Sequence[ModelState]) -> dict[str, StoredTensor]:
    """Frozen parameters as they were saved: whole in the one file, in ZeRO-3 an equal part in that of each rank."""
    head = models[0]
    _check_pieces(head.path, len(head.frozen), len(models))
    found: dict[str, StoredTensor] = {}
    for name, shape in head.frozen.items():
        whole = head.fragments.get(name)
        if len(models) == 1 and isinstance(whole, StoredTensor) and whole.shape == shape:
            found[name] = replace(whole, name=name)
            continue
        part = _part(shape, len(models))
        fragments = [(state.path, plain(state.path, state.fragments.get(name), name)) for state in models]
        for path, fragment in fragments:
            if fragment.numel != part:
                told = f"has {fragment.numel:,} elements of the frozen {printable(name)}, {part:,} are its part"
                raise two_saves(path, told)
        dtype = _dtype(fragments)
        found[name] = StoredTensor(name, dtype, shape, _parts([_Flat([f]) for _, f in fragments], 0, shape))
    return found


# -- checks --------------------------------------------------------------------------------------------------------


def _check_count(share: OptimState, count: int, wanted: int, head: ModelState) -> None:
    if count < wanted:
        raise InputError(
            f"{printable(share.path)}: holds {count:,} elements where the shapes in {head.path.name} need {wanted:,}",
            hint=MEND,
        )


def _check_shape(head: ModelState, name: str, shape: Shape) -> None:
    entry = head.module.get(name)
    if isinstance(entry, StoredTensor) and not _is_placeholder(entry) and entry.shape != shape:
        raise InputError(
            f"{printable(head.path)}: {printable(name)} is {list(entry.shape)} in its module and {list(shape)} in its "
            "param_shapes"
        )


def _check_pieces(path: Path, tensors: int, ranks: int) -> None:
    if tensors * ranks > MAX_PIECES:
        raise UnsafeError(
            f"{printable(path)}: {tensors:,} tensors on {ranks:,} ranks are in more pieces than any model"
        )


def _dtype(vectors: Iterable[tuple[Path, StoredTensor]]) -> str:
    """The one dtype of vectors, each of the file that holds it."""
    first: tuple[Path, StoredTensor] | None = None
    for path, vector in vectors:
        first = first or (path, vector)
        if vector.dtype != first[1].dtype:
            raise two_saves(path, f"holds {vector.dtype} where {first[0].name} holds {first[1].dtype}")
    return first[1].dtype if first else "F32"


# -- putting together ----------------------------------------------------------------------------------------------


def _is_placeholder(tensor: StoredTensor) -> bool:
    """What ZeRO-3 leaves of a parameter in `module` (partition_parameters.py `free_param`)."""
    return tensor.shape == (0,) and "F" in tensor.dtype


def _in_module_order(head: ModelState, found: Mapping[str, StoredTensor], *, complete: bool) -> dict[str, StoredTensor]:
    """Every weight, tied ones under both names: masters and frozen ones from `found`, the rest from `module`."""
    tensors: dict[str, StoredTensor] = {}
    empty: list[str] = []
    trained = [name for group in head.shapes or () for name in group]
    for name in dict.fromkeys([*head.module, *trained, *head.frozen, *head.shared]):
        entry = head.module.get(name)
        tensor = found.get(name) or _tied(head, found, name)
        if tensor is not None:
            tensors[name] = tensor
        elif isinstance(entry, OddTensor):
            raise UnsupportedError(
                f"{printable(head.path)}: {printable(name)} is of a kind that is not read: {entry.kind}"
            )
        elif entry is not None and (not _is_placeholder(entry) or name in head.buffers):
            tensors[name] = entry
        elif entry is not None or name not in head.shared:  # a name tied to a frozen one that was left out goes too
            empty.append(name)
    if not empty:
        return tensors
    names = f"{head.path.name} names {len(empty):,} weights that no file holds: {listed(empty, 3)}"
    if complete:
        raise InputError(f"{printable(head.path.parent)}: {names}", hint=MEND)
    missing = ("bf16_" if head.bf16 else "") + "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    raise InputError(
        f"{printable(head.path.parent)}: {missing} and those of the other ranks are missing; {names}",
        hint="get the *_optim_states.pt of every rank: after ZeRO-3 the weights are nowhere else",
    )


def _tied(head: ModelState, found: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """The tensor that a name is tied to, if it is one: `_get_shared_params` goes by address, which views share too."""
    entry, source = head.module.get(name), head.shared.get(name, "")
    tensor = found.get(source)
    if tensor is None and entry is None:
        other = head.module.get(source)
        tensor = other if isinstance(other, StoredTensor) and not _is_placeholder(other) else None
    if tensor is None or (isinstance(entry, StoredTensor) and entry.shape not in (tensor.shape, (0,))):
        return None
    return replace(tensor, name=name)
