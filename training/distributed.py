"""What differs when several processes hold the model: DeepSpeed's folders, and gathering what FSDP has spread out."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment

from llava_convert.core.errors import InputError, UsageError
from llava_convert.storage.zero.checkpoint import read_zero

from .checkpoint import Progress, pickled_as_mmengines, point_at
from .disk import unwritten, writing
from .recipe import Recipe

STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}
# xtuner calls its configs so.
WORDS = (*STAGES, *(f"deepspeed_{stage}" for stage in STAGES))


def deepspeed_plugin(recipe: Recipe, stage: str) -> Any:
    """accelerate's plugin for one of WORDS; `offload` keeps the optimiser, of ZeRO-3 the weights too, with the CPU.

    Raises UsageError without DeepSpeed.
    """
    if find_spec("deepspeed") is None:
        raise UsageError(
            "--deepspeed needs DeepSpeed, which is not installed", hint="pip install 'llava-convert[deepspeed]'"
        )
    from accelerate import DeepSpeedPlugin

    settings = recipe.train
    stage = stage.removeprefix("deepspeed_")
    zero: dict[str, Any] = {"stage": STAGES[stage], "overlap_comm": torch.cuda.is_available()}
    if stage.endswith("_offload"):
        cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": cpu} | ({"offload_param": cpu} if STAGES[stage] == 3 else {})
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.max_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.dtype == "bf16"},
            "fp16": {"enabled": settings.dtype == "fp16"},
        }
    )


def write_folder(engine: Any, path: Path, schedulers: list[dict[str, Any]], progress: Progress) -> None:
    """DeepSpeed's own checkpoint as the folder `iter_N.pth`, with mmengine's entries; every process calls this.

    The name appears when all of them have written. All write to one work_dir, as xtuner has it. Raises OutputError.
    """
    client = {"meta": progress.meta(), "message_hub": progress.message_hub(path), "param_schedulers": schedulers}
    partial = path.with_name(f".{path.name}.partial")
    main = torch.distributed.get_rank() == 0
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        torch.distributed.barrier()
        with writing():
            engine.save_checkpoint(
                str(path.parent), tag=partial.name, client_state=client, save_latest=False,
                exclude_frozen_parameters=True,
            )  # fmt: skip
        torch.distributed.barrier()
        if main:
            shutil.rmtree(path, ignore_errors=True)
            partial.replace(path)
            point_at(path)
    except OSError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise unwritten(problem, path) from None


def load_folder(engine: Any, path: Path, stage: int) -> None:
    """Take a DeepSpeed folder up again. It must be of this run's own making, since DeepSpeed unpickles it.

    Raises InputError for one of another ZeRO stage.
    """
    written = read_zero(path).stage
    if written != stage:
        raise InputError(f"{path} is of ZeRO-{written}", hint=f"resume it with --deepspeed zero{written}")
    pickled_as_mmengines()
    # DeepSpeed of these years calls torch.load without saying that it holds more than tensors.
    with patch_environment(torch_force_no_weights_only_load="1"):
        engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)


def gloo_in_order() -> str:
    """A backend for DeepSpeed on a CPU: gloo with one thread, so that what was asked for first is done first.

    Of several gathers DeepSpeed 0.14.4 waits for the last alone. A GPU's stream keeps their order; gloo's two threads
    do not, and ZeRO-3 then computes with memory that nothing was written to yet, which may well be finite.
    """

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = torch.distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in its stubs
        options._timeout, options._threads = timeout, 1
        options._devices = [torch.distributed.ProcessGroupGloo.create_default_device()]
        return torch.distributed.ProcessGroupGloo(store, rank, size, options)

    if not hasattr(torch.distributed.Backend, "GLOO_IN_ORDER"):
        torch.distributed.Backend.register_backend("gloo_in_order", create, devices=["cpu"])
    return "gloo_in_order"


def environment() -> None:
    """What DeepSpeed asks the environment for: what torchrun tells, also where one process was started without it."""
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    # On a CPU it would otherwise ask numactl, which may not be installed, how many processes there can be.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gathered(
    accelerator: Accelerator, wrapped: Any, model: torch.nn.Module, optimizer: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The whole state of model and optimiser on the main process, however they are spread out."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Its type says less than its documentation: names to moments, and a list of groups.
    moments: dict[str, Any] = get_optimizer_state_dict(wrapped, optimizer.optimizer, options=options)
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return {}, {}
    numbers = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    found = {numbers[name]: values for name, values in moments["state"].items()}
    shares = _shares(list(numbers.values()), optimizer)
    groups = [{**group, "params": share} for group, share in zip(moments["param_groups"], shares, strict=True)]
    return state, {"state": found, "param_groups": groups}


def _shares(every: list[Any], optimizer: Any) -> list[list[Any]]:
    """What is given for all parameters in the module's order, cut into the optimiser's groups."""
    ends = list(accumulate(len(group["params"]) for group in optimizer.param_groups))
    return [every[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def spread(wrapped: Any, model: torch.nn.Module, optimizer: Any, moments: Mapping[int, Any]) -> None:
    """Give FSDP's optimiser the moments of a checkpoint, each process its share."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = [name for name, _ in model.named_parameters()]
    shares = _shares(names, optimizer)
    state: dict[str, Any] = {
        "state": {names[i]: dict(one) for i, one in moments.items()},
        "param_groups": [
            {**{k: v for k, v in group.items() if k != "params"}, "params": share}
            for group, share in zip(optimizer.param_groups, shares, strict=True)
        ],
    }
    set_optimizer_state_dict(
        wrapped, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True, strict=False)
    )
