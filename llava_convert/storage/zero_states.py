"""What one file of a ZeRO checkpoint says: the model states of a rank, or its optimizer states.

Keys: deepspeed 0.14.4, checkpoint/constants.py, and the `state_dict` methods of runtime/zero/stage_1_and_2.py, stage3.py
and runtime/bf16_optimizer.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_convert.errors import InputError, UnsupportedError
from llava_convert.spec import TORCH_NAMES, StoredTensor
from llava_convert.storage.files import open_regular, read_fully, shown
from llava_convert.storage.torch_file import OddTensor, TorchFile, read_torch
from llava_convert.storage.unpickle import Inert

Shape = tuple[int, ...]

TWO_SAVES = "the folder mixes two saves"
_STEP_FORMATS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True, slots=True)
class ModelState:
    """A `*_model_states.pt`.

    `shapes` has one dict for each group of parameters, in the order of the flat vectors; None without ZeRO. `shared`
    takes the names of tied parameters to those which hold them. `step` counts updates of the weights.
    """

    path: Path
    module: Mapping[str, StoredTensor | OddTensor]
    shapes: tuple[dict[str, Shape], ...] | None
    frozen: Mapping[str, Shape]
    fragments: Mapping[str, StoredTensor]
    shared: Mapping[str, str]
    buffers: frozenset[str]
    ranks: int | None
    step: int | None
    bf16: bool
    meta: Mapping[Any, Any]
    stubs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OptimState:
    """An `*_optim_states.pt`: this rank's vectors of master weights, of which each has one extent."""

    path: Path
    stage: int
    ranks: int
    vectors: tuple[StoredTensor, ...]
    step: int | None
    stubs: tuple[str, ...]


def read_model_state(path: Path) -> ModelState:
    """Raises what `read_torch` does, and InputError where the file is none of model states."""
    file, root = _read(path)
    module = root.get("module")
    if not isinstance(module, dict) or "buffer_names" not in root:
        raise InputError(f"{shown(path)}: holds no model states of DeepSpeed (module and buffer_names)")
    groups = root.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups  # a plain dict until DeepSpeed had groups
    if groups is not None and not isinstance(groups, list):
        raise InputError(f"{shown(path)}: its param_shapes are no list of shapes")
    shapes = None if groups is None else tuple(_shapes(path, group) for group in groups)
    if shapes is not None and len({name for group in shapes for name in group}) < sum(map(len, shapes)):
        raise InputError(f"{shown(path)}: its param_shapes name a parameter twice")
    fragments = _dict(root.get("frozen_param_fragments"))
    shared = _dict(root.get("shared_params"))
    buffers = root.get("buffer_names")
    steps, skipped = root.get("global_steps"), root.get("skipped_steps")
    ranks = root.get("dp_world_size")
    config = _dict(root.get("ds_config"))
    return ModelState(
        path=path,
        module={
            name: value
            for name, value in module.items()
            if isinstance(name, str) and isinstance(value, StoredTensor | OddTensor)
        },
        shapes=shapes,
        frozen=_shapes(path, root.get("frozen_param_shapes") or {}),
        fragments={k: _plain(path, v, k) for k, v in fragments.items() if isinstance(k, str)},
        shared={k: v for k, v in shared.items() if isinstance(k, str) and isinstance(v, str)},
        buffers=frozenset(name for name in buffers if isinstance(name, str))
        if isinstance(buffers, list)
        else frozenset(),
        ranks=ranks if type(ranks) is int else None,
        step=steps - (skipped if type(skipped) is int else 0) if type(steps) is int else None,
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
        raise InputError(f"{shown(path)}: holds no master weights of ZeRO (single_partition_of_fp32_groups)")
    stage = state.get("zero_stage", 1)  # bf16_optimizer.py leaves it out, and partitions as ZeRO-1 does
    if isinstance(stage, Inert) and stage.args:  # ZeroStageEnum(2)
        stage = stage.args[0]
    if type(stage) is not int or stage not in (1, 2, 3) or (stage == 3) != scattered:
        raise InputError(f"{shown(path)}: tells no ZeRO stage that fits what it holds")
    counts = state.get("partition_count")
    every = set(counts) if isinstance(counts, list) else {counts}
    if len(every) != 1 or not all(type(count) is int and count > 0 for count in every):
        raise InputError(f"{shown(path)}: its partition_count is not one number of ranks")
    return OptimState(
        path=path,
        stage=stage,
        ranks=every.pop(),
        vectors=tuple(_plain(path, vector, "master weights") for vector in vectors),
        step=_step(state),
        stubs=file.stubs,
    )


def _read(path: Path) -> tuple[TorchFile, dict[Any, Any]]:
    file = read_torch(path)
    if not isinstance(file.root, dict):
        raise InputError(f"{shown(path)}: holds no dict, so no state of DeepSpeed")
    return file, file.root


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _shapes(path: Path, value: Any) -> dict[str, Shape]:
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: its shapes of parameters are no dict")
    shapes: dict[str, Shape] = {}
    for name, shape in value.items():
        sizes = isinstance(shape, tuple | list) and len(shape) <= 64
        if type(name) is not str or not sizes or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise InputError(f"{shown(path)}: {shown(name)} has no sound shape")
        shapes[name] = tuple(shape)
    return shapes


def _plain(path: Path, value: Any, what: str) -> StoredTensor:
    """A tensor whose elements lie in a row."""
    if isinstance(value, OddTensor):
        raise UnsupportedError(f"{shown(path)}: {shown(what)}: a tensor of a kind that is not read: {value.kind}")
    if not isinstance(value, StoredTensor) or value.strides is not None:
        raise InputError(f"{shown(path)}: {shown(what)}: not a plain tensor")
    if value.dtype not in TORCH_NAMES:
        raise UnsupportedError(f"{shown(path)}: {shown(what)}: of dtype {value.dtype}, which is not read")
    return value


def _step(state: Mapping[Any, Any]) -> int | None:
    """How many updates the optimizer made: torch keeps it with each vector, DeepSpeed's FusedAdam with each group."""
    base = _dict(state.get("base_optimizer_state", state.get("optimizer_state_dict")))
    groups = base.get("param_groups")
    places = [*_dict(base.get("state")).values(), *(groups if isinstance(groups, list) else ())]
    for place in places:
        step = _dict(place).get("step")
        if isinstance(step, StoredTensor) and step.numel == 1 and step.dtype in _STEP_FORMATS:
            form, extent = _STEP_FORMATS[step.dtype], step.extents[0]
            with open_regular(extent.path) as stream:
                stream.seek(extent.offset)
                (step,) = struct.unpack(form, read_fully(stream, struct.calcsize(form), extent.path))
        if type(step) in (int, float) and 0 <= step < 1 << 48:
            return int(step)
    return None
