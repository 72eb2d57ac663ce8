"""Reads DeepSpeed's ZeRO checkpoints, which are folders, by their pickled indexes: no weight is read, no DeepSpeed.

Each rank left its share of the float32 master weights, as flat vectors, in an `*_optim_states.pt`; the shapes and names
that these are cut by are in `*_model_states.pt`. A tensor of the result is the list of its pieces, wherever they lie.
What is written: deepspeed 0.14.4, runtime/engine.py `_save_checkpoint`; how it fits: its utils/zero_to_fp32.py.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from llava_convert.errors import InputError, UnsafeError, UnsupportedError
from llava_convert.spec import DTYPE_BITS, TORCH_NAMES, Extent, StoredTensor
from llava_convert.storage.files import (
    listed,
    open_regular,
    os_reason,
    read_fully,
    relative_name,
    require_inside,
    shown,
)
from llava_convert.storage.torch_file import OddTensor
from llava_convert.storage.zero_states import (
    TWO_SAVES,
    ModelState,
    OptimState,
    Shape,
    read_model_state,
    read_optim_state,
)

LATEST = "latest"
# A 70B model of 1,000 parameters on 1,024 ranks has a million pieces; an Extent takes about 200 bytes.
MAX_PIECES = 2_000_000

# engine.py `_get_ckpt_name` and `_get_rank_zero_ckpt_name`; the second "_" is optional for old files (its
# `_get_all_zero_checkpoint_names`). "mp" counts model parallel ranks, "pp" data parallel ones, for history's sake.
_FILE = re.compile(r"(?:(\w*zero_pp_rank_)(\d{1,6})_)?mp_rank_(\d{2,4})_?(model|optim)_states\.pt")
# Of pipelines and of mixtures of experts (`_get_expert_ckpt_name`, pipe/module.py `ckpt_layer_path`).
_OTHER = re.compile(r"(layer|expert|expp_rank)_.*_states\.pt")
_MEND = "copy or download every file of this checkpoint again, from one save"


@dataclass(frozen=True, slots=True)
class ZeroCheckpoint:
    """A folder's weights by name, in the order of the module; a tensor has as many extents as ranks hold some of it.

    `meta` is what mmengine saved beside them. `stage` is 0 where DeepSpeed ran without ZeRO, `ranks` 1 where weights
    are not partitioned. `notes` and `warnings` are for the user; `stubs` as in TorchFile.
    """

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    meta: Mapping[Any, Any]
    stage: int
    ranks: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stubs: tuple[str, ...]


def recognise(names: Iterable[str]) -> str | None:
    """Why a folder of these files is one of DeepSpeed's, None when it is not."""
    every = set(names)
    states = sorted(name for name in every if _FILE.fullmatch(name) or _OTHER.fullmatch(name))
    if states:
        return f"a DeepSpeed directory ({listed(states, 2)})"
    # The folder that DeepSpeed's own save_checkpoint is given; with a config.json it is transformers' instead.
    return "a DeepSpeed directory (latest)" if LATEST in every and "config.json" not in every else None


def read_zero(folder: Path) -> ZeroCheckpoint:
    """The weights of the ZeRO-1, 2 or 3 checkpoint in `folder`, float32 masters wherever they were saved.

    Without `*_optim_states.pt` the 16-bit weights of `module` are taken, and a warning says so. Raises InputError where
    a file is missing, files are of different saves, or hold less than their shapes say (fault row 44); UnsupportedError
    for model parallel saves and mixtures of experts; UnsafeError as `read_torch` does.
    """
    root = _state_folder(folder)
    model_files, optim_files = _state_files(root)
    models = [read_model_state(path) for path in model_files]
    shares = [read_optim_state(path) for path in optim_files]
    head = models[0]
    partitioned = head.path.name.startswith("zero_pp_rank_")
    stage = shares[0].stage if shares else 3 if partitioned else (2 if head.shapes is not None else 0)
    if partitioned != (stage == 3):
        raise InputError(f"{shown(head.path)}: not of the ZeRO-{stage} save beside it: {TWO_SAVES}", hint=_MEND)
    _check_ranks(models, shares, partitioned)
    _check_steps(models)
    _check_steps(shares)

    found = _frozen(models, partitioned)
    notes: list[str] = []
    warnings: list[str] = []
    if shares:
        shapes = _shapes(head)
        _check_pieces(sum(map(len, shapes)), len(shares))
        masters = _cut_scattered(shapes, shares, head) if partitioned else _cut_contiguous(shapes, shares, head)
        found |= masters
        kinds = listed(sorted({TORCH_NAMES[tensor.dtype] for tensor in masters.values()}))
        plural = "s" if len(shares) > 1 else ""
        notes.append(f"{kinds} masters of {len(shares)} rank{plural}, ZeRO-{stage}")
        warnings += _steps_apart(head, shares[0])
    tensors = _in_module_order(head, found, complete=bool(shares))
    if not shares:
        kinds = listed(sorted({TORCH_NAMES.get(t.dtype, t.dtype) for t in tensors.values()}))
        warnings.append(
            f"{shown(root.name)} has no optimizer states (*_optim_states.pt), so no float32 masters: the weights are "
            f"the copies that training computed with ({kinds})"
        )
    stubs = sorted({stub for state in (*models, *shares) for stub in state.stubs})
    files = (*model_files, *optim_files)
    ranks = len(shares) or len(models)
    return ZeroCheckpoint(tensors, files, head.meta, stage, ranks, tuple(notes), tuple(warnings), tuple(stubs))


# -- files ---------------------------------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(f"{shown(folder)}: cannot be listed: {os_reason(error)}") from error


def _state_folder(folder: Path) -> Path:
    """`folder`, or the one of the save that its `latest` names (engine.py `save_checkpoint`)."""
    names = _names(folder)
    if any(_FILE.fullmatch(name) or _OTHER.fullmatch(name) for name in names):
        return folder
    if LATEST not in names:
        raise InputError(f"{shown(folder)}: no file of a DeepSpeed checkpoint (*_model_states.pt) in it")
    pointer = folder / LATEST
    with open_regular(pointer) as stream:
        tag = read_fully(stream, 4096, pointer).decode("utf-8", "replace").strip()
    plain = relative_name(tag)
    if plain is None:
        raise UnsafeError(f"{shown(pointer)}: names '{shown(tag)}', which is no folder beside it")
    target = require_inside(folder, plain)
    if not target.is_dir():
        saves = [name for name in names if (folder / name).is_dir()]
        there = f"; there are {listed(saves)}" if saves else ""
        raise InputError(
            f"{shown(pointer)}: names {shown(plain)}, which is not there{there}", hint="give the folder of one save"
        )
    if not any(_FILE.fullmatch(name) for name in _names(target)):
        raise InputError(f"{shown(target)}: no file of a DeepSpeed checkpoint (*_model_states.pt) in it", hint=_MEND)
    return target


def _state_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Model states and optimizer states by rank; the first are one file, except in ZeRO-3."""
    series: dict[str, dict[str, dict[int, str]]] = {"model": {}, "optim": {}}
    for name in _names(root):
        match = _FILE.fullmatch(name)
        if _OTHER.fullmatch(name) or (match and int(match[3])):
            raise UnsupportedError(
                f"{shown(root / name)}: of a model that was split by layers, experts or within tensors, which is not read"
            )
        if match is None or (match[4] == "optim" and not match[1]):
            continue
        ranks = series[match[4]].setdefault(match[1] or "", {})
        if ranks.setdefault(int(match[2] or 0), name) != name:
            raise InputError(
                f"{shown(root / name)}: {TWO_SAVES}: {ranks[int(match[2])]} is of the same rank", hint=_MEND
            )
    paths: dict[str, list[Path]] = {}
    for what, found in series.items():
        if len(found) > 1:
            names = [next(iter(ranks.values())) for ranks in found.values()]
            raise InputError(f"{shown(root)}: {TWO_SAVES}: {listed(names)}", hint=_MEND)
        paths[what] = []
        for prefix, ranks in found.items():
            count = max(ranks) + 1
            missing = [
                _file_name(prefix, rank, what) for rank in range(min(count, len(ranks) + 8)) if rank not in ranks
            ]
            if missing:
                raise InputError(f"{shown(root)}: files of some ranks are missing: {listed(missing)}", hint=_MEND)
            paths[what] = [require_inside(root, ranks[rank]) for rank in range(count)]
    if not paths["model"]:
        raise InputError(
            f"{shown(root)}: no model states: mp_rank_00_model_states.pt is missing (in ZeRO-3, "
            "zero_pp_rank_0_mp_rank_00_model_states.pt), which has the names of the weights",
            hint=_MEND,
        )
    return paths["model"], paths["optim"]


def _file_name(prefix: str, rank: int, what: str) -> str:
    return f"{prefix}{rank}_mp_rank_00_{what}_states.pt" if prefix else f"mp_rank_00_{what}_states.pt"


# -- do the files belong together? ---------------------------------------------------------------------------------


def _check_ranks(models: Sequence[ModelState], shares: Sequence[OptimState], partitioned: bool) -> None:
    """As many files as ranks trained, and every file of the same opinion."""
    first: ModelState | OptimState = shares[0] if shares else models[0]
    ranks = first.ranks
    for state in (*shares, *(models if partitioned or shares else ())):
        if state.ranks is not None and ranks is not None and state.ranks != ranks:
            raise InputError(
                f"{shown(state.path)}: was saved by {state.ranks} ranks, {first.path.name} by {ranks}: {TWO_SAVES}",
                hint=_MEND,
            )
    for share in shares:
        if share.stage != shares[0].stage:
            raise InputError(
                f"{shown(share.path)}: is of ZeRO-{share.stage}, {first.path.name} of ZeRO-{shares[0].stage}: {TWO_SAVES}",
                hint=_MEND,
            )
    for files in (shares, models if partitioned else ()):
        if files and ranks is not None and len(files) != ranks:
            _refuse_count(files, ranks)


def _refuse_count(files: Sequence[ModelState] | Sequence[OptimState], ranks: int) -> None:
    path = files[0].path
    if len(files) > ranks:
        raise InputError(f"{shown(path)}: was saved by {ranks} ranks, of which {len(files)} have files", hint=_MEND)
    last = files[-1].path.name
    missing = re.sub(r"(zero_pp_rank_)\d+", rf"\g<1>{len(files)}", last)
    more = ranks - len(files) - 1
    tail = f" and those of {more} more ranks" if more else ""
    raise InputError(f"{shown(path.parent)}: {missing}{tail} missing: {ranks} ranks saved it", hint=_MEND)


def _check_steps(states: Sequence[ModelState] | Sequence[OptimState]) -> None:
    for state in states:
        if None not in (state.step, states[0].step) and state.step != states[0].step:
            raise InputError(
                f"{shown(state.path)}: was saved at step {state.step}, {states[0].path.name} at step "
                f"{states[0].step}: {TWO_SAVES}",
                hint=_MEND,
            )


def _steps_apart(model: ModelState, share: OptimState) -> list[str]:
    # Only a warning: an optimizer that was started anew on resumed weights counts from zero.
    if model.step is None or share.step is None or model.step == share.step:
        return []
    return [
        f"{model.path.name} is of step {model.step}, the optimizer states of step {share.step}: "
        "the files may be of two saves; the weights are those of the optimizer states"
    ]


def _check_pieces(tensors: int, ranks: int) -> None:
    if tensors * ranks > MAX_PIECES:
        raise UnsafeError(f"{tensors:,} tensors on {ranks:,} ranks make more pieces than any model ({MAX_PIECES:,})")


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
            item = DTYPE_BITS[vector.dtype] // 8
            take = min(count, end - first)
            if take:
                skipped = first - (end - vector.numel)
                yield Extent(vector.extents[0].path, vector.extents[0].offset + skipped * item, take * item)
            first, count, index = first + take, count - take, index + 1


def _shapes(head: ModelState) -> tuple[dict[str, Shape], ...]:
    if head.shapes is None:
        raise InputError(
            f"{shown(head.path)}: has no param_shapes, although optimizer states lie beside it", hint=_MEND
        )
    return head.shapes


def _dtype(vectors: Iterable[tuple[Path, StoredTensor]]) -> str:
    dtypes: dict[str, Path] = {}
    for path, vector in vectors:
        dtypes.setdefault(vector.dtype, path)
    if len(dtypes) > 1:
        raise InputError(f"{shown(list(dtypes.values())[-1])}: masters of {listed(dtypes)}: {TWO_SAVES}", hint=_MEND)
    return next(iter(dtypes), "F32")


def _cut_contiguous(
    shapes: Sequence[dict[str, Shape]], shares: Sequence[OptimState], head: ModelState
) -> dict[str, StoredTensor]:
    """ZeRO-1 and 2: a group's partitions in a row are its parameters in a row, with padding at the end only.

    All partitions of a group are of one size; the last is saved without its padding (stage_1_and_2.py
    `_get_groups_without_padding`), or with it (bf16_optimizer.py). The padding makes a multiple of twice the ranks.
    """
    ranks, found = len(shares), {}
    for share in shares:
        if len(share.vectors) != len(shapes):
            raise InputError(
                f"{shown(share.path)}: has {len(share.vectors)} groups of parameters, {head.path.name} has "
                f"{len(shapes)}: {TWO_SAVES}",
                hint=_MEND,
            )
    for index, group in enumerate(shapes):
        vectors = [share.vectors[index] for share in shares]
        size, wanted = max(vector.numel for vector in vectors), sum(map(prod, group.values()))
        size = max(size, -(-wanted // ranks))
        for rank, (share, vector) in enumerate(zip(shares, vectors, strict=True)):
            least = min(size, max(0, wanted - rank * size))
            if vector.numel < least:
                raise _short(share, vector.numel, least, head)
        if size * ranks > -(-wanted // (2 * ranks)) * 2 * ranks:
            raise InputError(
                f"{shown(head.path)}: its shapes need {wanted:,} elements, the {ranks} ranks' partitions are "
                f"{size * ranks:,}: {TWO_SAVES}",
                hint=_MEND,
            )
        flat, at = _Flat(vectors), 0
        dtype = _dtype(zip((share.path for share in shares), vectors, strict=True))
        for name, shape in group.items():
            _check_shape(head, name, shape)
            found[name] = StoredTensor(name, dtype, shape, tuple(flat.cut(at, prod(shape))))
            at += prod(shape)
    return found


def _cut_scattered(
    shapes: Sequence[dict[str, Shape]], shares: Sequence[OptimState], head: ModelState
) -> dict[str, StoredTensor]:
    """ZeRO-3: every rank holds an equal share of each parameter, rounded up, one after another (`_partition_param`).

    The vectors of a rank (one for each of `sub_group_size` elements or less) are one vector in pieces.
    """
    ranks = len(shares)
    every = {name: shape for group in shapes for name, shape in group.items()}
    wanted = sum(-(-prod(shape) // ranks) for shape in every.values())
    flats = [_Flat(share.vectors) for share in shares]
    for share, flat in zip(shares, flats, strict=True):
        if flat.count < wanted:
            raise _short(share, flat.count, wanted, head)
        if flat.count > wanted:
            raise InputError(
                f"{shown(share.path)}: has {flat.count:,} elements where the shapes in {head.path.name} need "
                f"{wanted:,}: {TWO_SAVES}",
                hint=_MEND,
            )
    dtype = _dtype((share.path, vector) for share in shares for vector in share.vectors)
    found, at = {}, 0
    for name, shape in every.items():
        _check_shape(head, name, shape)
        part = -(-prod(shape) // ranks)
        extents = tuple(
            extent
            for rank, flat in enumerate(flats)
            for extent in flat.cut(at, min(part, max(0, prod(shape) - rank * part)))
        )
        found[name] = StoredTensor(name, dtype, shape, extents)
        at += part
    return found


def _short(share: OptimState, count: int, wanted: int, head: ModelState) -> InputError:
    return InputError(
        f"{shown(share.path)}: its partition has {count:,} elements where the shapes in {head.path.name} need {wanted:,}",
        hint=_MEND,
    )


def _check_shape(head: ModelState, name: str, shape: Shape) -> None:
    entry = head.module.get(name)
    if isinstance(entry, StoredTensor) and not _is_placeholder(entry) and entry.shape != shape:
        raise InputError(
            f"{shown(head.path)}: {shown(name)} is {list(entry.shape)} in its module, {list(shape)} in its param_shapes"
        )


def _frozen(models: Sequence[ModelState], partitioned: bool) -> dict[str, StoredTensor]:
    """Frozen parameters, in the dtype that they were trained beside: whole in rank 0's file, in ZeRO-3 a part a rank."""
    head = models[0]
    _check_pieces(len(head.frozen), len(models))
    found: dict[str, StoredTensor] = {}
    for name, shape in head.frozen.items():
        part = -(-prod(shape) // len(models)) if partitioned else prod(shape)
        extents: list[Extent] = []
        dtypes = set()
        for rank, state in enumerate(models if partitioned else models[:1]):
            fragment = state.fragments.get(name)
            if fragment is None or fragment.numel < part:
                count = 0 if fragment is None else fragment.numel
                raise InputError(
                    f"{shown(state.path)}: has {count:,} elements of the frozen {shown(name)} where {part:,} are needed",
                    hint=_MEND,
                )
            dtypes.add(fragment.dtype)
            extents += _Flat([fragment]).cut(0, min(part, max(0, prod(shape) - rank * part)))
        if len(dtypes) > 1 or not dtypes <= TORCH_NAMES.keys():
            raise UnsupportedError(f"{shown(head.path)}: the frozen {shown(name)} is of {listed(sorted(dtypes))}")
        found[name] = StoredTensor(name, dtypes.pop(), shape, tuple(extents))
    return found


# -- putting together ----------------------------------------------------------------------------------------------


def _is_placeholder(tensor: StoredTensor) -> bool:
    """What ZeRO-3 leaves of a parameter in `module` (partition_parameters.py `free_param`)."""
    return tensor.shape == (0,) and "F" in tensor.dtype


def _in_module_order(head: ModelState, found: Mapping[str, StoredTensor], *, complete: bool) -> dict[str, StoredTensor]:
    """Every weight once, tied ones under both names: masters and frozen ones as `found`, the rest from `module`."""
    tensors: dict[str, StoredTensor] = {}
    empty: list[str] = []
    trained = [name for group in head.shapes or () for name in group]
    for name in dict.fromkeys([*head.module, *trained, *head.frozen, *head.shared]):
        entry = head.module.get(name)
        source = head.shared.get(name, "")
        tied = found.get(source) or (None if entry is not None else head.module.get(source))
        tensor = found.get(name)
        if tensor is None and isinstance(tied, StoredTensor) and _may_be(entry, tied):
            tensor = tied.renamed(name)
        if tensor is not None:
            tensors[name] = tensor
        elif isinstance(entry, OddTensor):
            raise UnsupportedError(f"{shown(head.path)}: {shown(name)} is of a kind that is not read: {entry.kind}")
        elif entry is not None and not (_is_placeholder(entry) and name not in head.buffers):
            tensors[name] = entry
        elif entry is not None or name not in head.shared:  # tied to something frozen, both are left out
            empty.append(name)
    if empty and not complete:
        prefix = ("bf16_" if head.bf16 else "") + "zero_pp_rank_0"
        raise InputError(
            f"{shown(head.path.parent)}: {prefix}_mp_rank_00_optim_states.pt is missing, and the files of the other "
            f"ranks: {head.path.name} names {len(empty):,} weights but does not hold them: {listed(empty, 3)}",
            hint="get the *_optim_states.pt of all ranks; without them nothing of these weights is left",
        )
    if empty:
        raise InputError(
            f"{shown(head.path)}: no file holds {len(empty):,} of its weights: {listed(empty, 3)}", hint=_MEND
        )
    return tensors


def _may_be(entry: StoredTensor | OddTensor | None, tied: StoredTensor) -> bool:
    """Whether a module's entry can be the tied tensor: `_get_shared_params` goes by address, which views share too."""
    return not isinstance(entry, StoredTensor) or _is_placeholder(entry) or entry.shape == tied.shape
