"""What one file of a ZeRO checkpoint says: the model states of a rank, or its optimizer states.

Keys: deepspeed 0.14.4, checkpoint/constants.py, and the `state_dict` of runtime/zero/stage_1_and_2.py, of
runtime/zero/stage3.py (there `_rigid_state_dict`) and of runtime/bf16_optimizer.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import TORCH_NAMES, StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import open_regular, read_fully
from llava_convert.storage.pickle.machine import Inert
from llava_convert.storage.torch.file import OddTensor, TorchFile, read_torch

Shape = tuple[int, ...]
Entries = Mapping[str, StoredTensor | OddTensor]

MEND = "copy or download every file of this checkpoint again, all of one save"
_STEP_FORMATS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


def two_saves(path: Path, what: str) -> InputError:
    return InputError(f"{printable(path)}: {what}: the folder mixes two saves", hint=MEND)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A `*_model_states.pt`.

    `shapes` has one dict for each group of parameters, in the order of the flat vectors; None without ZeRO. `frozen`
    are the shapes of `fragments`. `shared` takes the names of tied parameters to those which hold them. `step` counts
    updates of the weights.
    """

    path: Path
    module: Entries
    shapes: tuple[dict[str, Shape], ...] | None
    frozen: Mapping[str, Shape]
    fragments: Entries
    shared: Mapping[str, str]
    buffers: frozenset[str]
    ranks: int | None
    step: int | None
    stage: int
    bf16: bool
    meta: Mapping[Any, Any]
    stubs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OptimState:
    """An `*_optim_states.pt`: this rank's vectors of master weights, of which each has one extent."""

    path: Path
    stage: int
    ranks: int | None
    vectors: tuple[StoredTensor, ...]
    step: int | None
    stubs: tuple[str, ...]


def read_model_state(path: Path) -> ModelState:
    """Raises what `read_torch` does, and InputError where the file is none of model states."""
    file, root = _read(path)
    if not isinstance(root.get("module"), dict) or "buffer_names" not in root:
        raise InputError(f"{printable(path)}: holds no model states of DeepSpeed (module, buffer_names)")
    groups = root.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups  # a plain dict until DeepSpeed kept groups apart
    if groups is not None and not isinstance(groups, list):
        raise InputError(f"{printable(path)}: its param_shapes are not a list of shapes")
    shapes = None if groups is None else tuple(_shapes(path, group) for group in groups)
    if shapes is not None and len({name for group in shapes for name in group}) < sum(map(len, shapes)):
        raise InputError(f"{printable(path)}: its param_shapes name a parameter twice")
    buffers, shared = root["buffer_names"], _dict(root.get("shared_params"))
    steps, skipped, ranks = (_count(root.get(key)) for key in ("global_steps", "skipped_steps", "dp_world_size"))
    config = _dict(root.get("ds_config"))
    return ModelState(
        path=path,
        module=_tensors(root["module"]),
        shapes=shapes,
        frozen=_shapes(path, root.get("frozen_param_shapes") or {}),
        fragments=_tensors(root.get("frozen_param_fragments")),
        shared={name: of for name, of in shared.items() if isinstance(name, str) and isinstance(of, str)},
        buffers=frozenset(n for n in (buffers if isinstance(buffers, list) else ()) if isinstance(n, str)),
        ranks=ranks,
        step=None if steps is None else steps - (skipped or 0),
        stage=_count(_dict(config.get("zero_optimization")).get("stage")) or 0,
        bf16=_dict(config.get("bf16")).get("enabled") is True,
        meta=_dict(root.get("meta")),
        stubs=file.stubs,
    )


def read_optim_state(path: Path) -> OptimState:
    """Raises what `read_torch` does, and InputError where the file is none of ZeRO's optimizer states."""
    file, root = _read(path)
    state = _dict(root.get("optimizer_state_dict"))
    scattered = "fp32_flat_groups" in state
    vectors = state.get("fp32_flat_groups" if scattered else "single_partition_of_fp32_groups")
    if not isinstance(vectors, list):
        raise InputError(f"{printable(path)}: holds no master weights of ZeRO (single_partition_of_fp32_groups)")
    stage = state.get("zero_stage", 1)  # bf16_optimizer.py leaves it out, and partitions as ZeRO-1 does
    if isinstance(stage, Inert) and stage.args:  # ZeroStageEnum(2)
        stage = stage.args[0]
    if type(stage) is not int or stage not in (1, 2, 3) or (stage == 3) != scattered:
        raise InputError(f"{printable(path)}: tells no ZeRO stage that fits the weights it holds")
    counts = state.get("partition_count")
    every: list[Any] = counts if isinstance(counts, list) and counts else [counts]
    if not all(type(count) is int and count > 0 and count == every[0] for count in every):
        raise InputError(f"{printable(path)}: its partition_count is not one number of ranks")
    return OptimState(
        path=path,
        stage=stage,
        ranks=every[0],
        vectors=tuple(plain(path, vector, "master weights") for vector in vectors),
        step=_step(state),
        stubs=file.stubs,
    )


def plain(path: Path, value: Any, what: str) -> StoredTensor:
    """A tensor whose elements lie in a row; `what` and `path` are for messages."""
    if isinstance(value, OddTensor):
        raise UnsupportedError(f"{printable(path)}: {printable(what)}: of a kind that is not read: {value.kind}")
    if not isinstance(value, StoredTensor) or value.strides is not None:
        raise InputError(f"{printable(path)}: {printable(what)}: not a plain tensor")
    if value.dtype not in TORCH_NAMES:
        raise UnsupportedError(
            f"{printable(path)}: {printable(what)}: of dtype {value.dtype}, of which nothing can be made"
        )
    return value


def _read(path: Path) -> tuple[TorchFile, dict[Any, Any]]:
    file = read_torch(path)
    if not isinstance(file.root, dict):
        raise InputError(f"{printable(path)}: holds no dict, so no state of DeepSpeed")
    return file, file.root


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _tensors(value: Any) -> Entries:
    entries = _dict(value).items()
    return {name: t for name, t in entries if isinstance(name, str) and isinstance(t, StoredTensor | OddTensor)}


def _shapes(path: Path, value: Any) -> dict[str, Shape]:
    if not isinstance(value, dict):
        raise InputError(f"{printable(path)}: its shapes of parameters are not a dict")
    shapes: dict[str, Shape] = {}
    for name, shape in value.items():
        sizes = isinstance(shape, tuple | list) and len(shape) <= 64
        if type(name) is not str or not sizes or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise InputError(f"{printable(path)}: {printable(name)} has no sound shape")
        shapes[name] = tuple(shape)
    return shapes


def _step(state: Mapping[Any, Any]) -> int | None:
    """How many updates the optimizer made: torch keeps it with each vector, DeepSpeed's FusedAdam with each group."""
    base = _dict(state.get("base_optimizer_state", state.get("optimizer_state_dict")))
    groups = base.get("param_groups")
    for place in (*_dict(base.get("state")).values(), *(groups if isinstance(groups, list) else ())):
        step: Any = _dict(place).get("step")
        if isinstance(step, StoredTensor) and step.numel == 1 and step.dtype in _STEP_FORMATS:
            form, extent = _STEP_FORMATS[step.dtype], step.extents[0]
            with open_regular(extent.path) as stream:
                stream.seek(extent.offset)
                (step,) = struct.unpack(form, read_fully(stream, struct.calcsize(form), extent.path))
        if type(step) in (int, float) and 0 <= step < 1 << 48:
            return int(step)
    return None
