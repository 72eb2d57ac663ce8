"""What differs when several processes hold the model: DeepSpeed's folders, and gathering what FSDP has spread out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from llava_convert.errors import InputError, UsageError

from .checkpoint import Progress, point_at
from .recipe import Recipe

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_plugin(recipe: Recipe, stage: str) -> Any:
    """accelerate's plugin for `zero1`, `zero2` or `zero3`. Raises UsageError for other words and without DeepSpeed."""
    if stage not in STAGES:
        raise UsageError(f"--deepspeed {stage}: it is one of {', '.join(STAGES)}")
    if find_spec("deepspeed") is None:
        raise UsageError(
            "--deepspeed needs DeepSpeed, which is not installed", hint="pip install 'llava-convert[deepspeed]'"
        )
    from accelerate import DeepSpeedPlugin

    settings = recipe.train
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.max_norm,
            "zero_optimization": {"stage": STAGES[stage], "overlap_comm": torch.cuda.is_available()},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.dtype == "bf16"},
            "fp16": {"enabled": settings.dtype == "fp16"},
        }
    )


def write_folder(engine: Any, path: Path, schedulers: list[dict[str, Any]], progress: Progress) -> None:
    """DeepSpeed's own checkpoint as the folder `iter_N.pth`, with mmengine's entries; every process calls this."""
    client = {"meta": progress.meta(), "message_hub": progress.message_hub(path), "param_schedulers": schedulers}
    engine.save_checkpoint(
        str(path.parent), tag=path.name, client_state=client, save_latest=False, exclude_frozen_parameters=True
    )
    if torch.distributed.get_rank() == 0:
        point_at(path)


def load_folder(engine: Any, path: Path) -> int:
    """Take a DeepSpeed folder up again; returns the iteration.

    It must be of this run's own making, since DeepSpeed unpickles it. Raises InputError without DeepSpeed.
    """
    if not hasattr(engine, "load_checkpoint"):
        raise InputError(
            f"{path} is a DeepSpeed checkpoint", hint="resume it with the same --deepspeed and number of processes"
        )
    _, client = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)
    return int(client["meta"]["iter"])


def gathered(
    accelerator: Accelerator, wrapped: Any, model: torch.nn.Module, optimizer: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The whole state of model and optimiser on the main process, however they are spread out."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = get_optimizer_state_dict(wrapped, optimizer.optimizer, options=options)
    numbers = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state = {numbers[name]: values for name, values in moments["state"].items() if name in numbers}
    group = {k: v for k, v in moments["param_groups"][0].items() if k != "params"} if moments else {}
    groups = [{**group, "params": list(numbers.values())}]
    return accelerator.get_state_dict(wrapped), {"state": state, "param_groups": groups}
