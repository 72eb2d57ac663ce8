"""Checkpoint folders like DeepSpeed's, made by torch.save alone: any stage, number of ranks and grouping.

They follow deepspeed 0.14.4: runtime/zero/stage_1_and_2.py and stage3.py for the partitions, runtime/engine.py
`_save_checkpoint` for the model states. Padding is filled with 7.75, so that reading it for a weight is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PADDING = 7.75
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Save:
    """What is trained and how it is saved. `trained` are float32 masters, `groups` splits their names.

    `tied` takes a second name to the trained one. `sub_groups` is how many vectors a rank has in ZeRO-3. `lean` takes
    the padding off the last partition, as ZeRO-1 and 2 do and the optimizer for bfloat16 does not.
    """

    trained: Tensors
    stage: int = 2
    ranks: int = 2
    groups: Sequence[Sequence[str]] | None = None
    frozen: Tensors = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    half: torch.dtype = torch.bfloat16
    sub_groups: int = 1
    lean: bool = True
    optimizer: bool = True
    step: int = 3
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return "bf16_" if self.half == torch.bfloat16 else ""

    def names(self) -> list[list[str]]:
        return [list(group) for group in self.groups] if self.groups is not None else [list(self.trained)]

    def model_file(self, rank: int = 0) -> str:
        return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if self.stage == 3 else "mp_rank_00_model_states.pt"

    def optim_file(self, rank: int) -> str:
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write(folder: Path, save: Save) -> Path:
    """Write every file of the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(save.ranks if save.stage == 3 else 1):
        torch.save(model_state(save, rank), folder / save.model_file(rank))
    for rank in range(save.ranks if save.optimizer else 0):
        torch.save(optim_state(save, rank), folder / save.optim_file(rank))
    return folder


def model_state(save: Save, rank: int = 0) -> dict[str, Any]:
    """What one `*_model_states.pt` holds."""
    module: dict[str, torch.Tensor] = {}
    for name, tensor in {**save.frozen, **save.trained}.items():
        value = tensor.to(save.half)
        module[name] = torch.empty(0, dtype=save.half) if save.stage == 3 else value
    for name, source in save.tied.items():
        module[name] = module[source]
    module |= save.buffers
    frozen = save.frozen if save.frozen and save.stage > 1 else None  # ZeRO-1 leaves them to `module`
    return {
        "module": module,
        "buffer_names": list(save.buffers),
        "optimizer": None,
        "param_shapes": [{name: save.trained[name].shape for name in group} for group in save.names()],
        "frozen_param_shapes": frozen and {name: tensor.shape for name, tensor in frozen.items()},
        "shared_params": dict(save.tied),
        "frozen_param_fragments": frozen and {name: _fragment(save, t, rank) for name, t in frozen.items()},
        "skipped_steps": 1,
        "global_steps": save.step + 1,
        "dp_world_size": save.ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": save.stage}, "bf16": {"enabled": bool(save.prefix)}},
        "ds_version": "0.14.4",
        "meta": dict(save.meta),
    }


def optim_state(save: Save, rank: int) -> dict[str, Any]:
    """What one `*_optim_states.pt` holds."""
    vectors = (scattered if save.stage == 3 else contiguous)(save, rank)
    moments = {i: {"step": torch.tensor(float(save.step)), "exp_avg": v * 0} for i, v in enumerate(vectors)}
    base = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    state: dict[str, Any] = {"zero_stage": save.stage, "overflow": False}
    if save.stage == 3:
        state |= {"partition_count": save.ranks, "optimizer_state_dict": base, "fp32_flat_groups": vectors}
    else:
        state |= {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": vectors,
            "group_paddings": [0] * len(vectors),
            "partition_count": [save.ranks] * len(vectors),
        }
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.14.4"}


def contiguous(save: Save, rank: int) -> list[torch.Tensor]:
    """A rank's partition of each group in ZeRO-1 and 2: groups are padded to a multiple of twice the ranks."""
    parts = []
    for group in save.names():
        flat = torch.cat([save.trained[name].reshape(-1) for name in group])
        size = math.ceil(len(flat) / (2 * save.ranks)) * 2
        padding = size * save.ranks - len(flat)
        part = _padded(flat, padding)[rank * size : (rank + 1) * size].clone()
        # Where the padding is longer than the partition, DeepSpeed's own slice ends at a negative index.
        parts.append(part[: len(part) - padding] if save.lean and rank == save.ranks - 1 else part)
    return parts


def scattered(save: Save, rank: int) -> list[torch.Tensor]:
    """A rank's vectors in ZeRO-3: its part of every parameter, split at parameters into sub-groups."""
    parts = [_part(save.trained[name], rank, save.ranks) for group in save.names() for name in group]
    cuts = [len(parts) * index // save.sub_groups for index in range(save.sub_groups + 1)]
    empty = torch.empty(0)
    return [torch.cat([empty, *parts[a:b]]) for a, b in pairwise(cuts)]


def _fragment(save: Save, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    value = tensor.to(save.half)
    return _part(value, rank, save.ranks) if save.stage == 3 else value


def _part(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = math.ceil(tensor.numel() / ranks)
    return _padded(tensor.reshape(-1), size * ranks - tensor.numel())[rank * size : (rank + 1) * size].clone()


def _padded(flat: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((count,), PADDING, dtype=flat.dtype)])
