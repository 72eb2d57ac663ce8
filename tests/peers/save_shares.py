"""Save a transformers LLaVA as trainings on several processes leave it; run with one of the forms in `FORMS`.

python save_shares.py FORM MODEL OUT PROCESSES
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlavaForConditionalGeneration


def model_at(folder: str) -> torch.nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that changes nothing, so that the optimizer has a state."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def fsdp2(folder: str, out: Path, count: int) -> None:
    """FSDP2, model and optimizer side by side, as accelerate and torchtitan nest them."""
    mesh = init_device_mesh("cpu", (count,))
    model = model_at(folder)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    one_step(model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=out)


def accelerate_saved(model: torch.nn.Module, out: Path, count: int, version: int) -> None:
    """What accelerate's `save_fsdp_model` writes (SHARDED_STATE_DICT)."""
    from accelerate import PartialState
    from accelerate.utils import save_fsdp_model

    PartialState(cpu=True, backend="gloo")  # its logger asks for it

    class Plugin:
        fsdp_version, state_dict_type, cpu_ram_efficient_loading = version, StateDictType.SHARDED_STATE_DICT, False
        state_dict_config = ShardedStateDictConfig(offload_to_cpu=False) if version == 1 else None
        optim_state_dict_config = None

    class Processes:
        is_fsdp2, process_index, num_processes = version == 2, dist.get_rank(), count
        is_main_process = dist.get_rank() == 0

        def wait_for_everyone(self) -> None:
            dist.barrier()

    save_fsdp_model(Plugin(), Processes(), model, str(out))


def accelerate_fsdp2(folder: str, out: Path, count: int) -> None:
    model = model_at(folder)
    fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    accelerate_saved(model, out, count, 2)


def accelerate_fsdp1(folder: str, out: Path, count: int) -> None:
    model = FSDP(model_at(folder), device_id=torch.device("cpu"), use_orig_params=True)
    accelerate_saved(model, out, count, 1)


def fsdp1(folder: str, out: Path, count: int) -> None:
    """FSDP1 with SHARDED_STATE_DICT of tensors without a mesh."""
    model = FSDP(model_at(folder), device_id=torch.device("cpu"), use_orig_params=True)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=False)):
        dcp.save({"model": model.state_dict()}, checkpoint_id=out)


def fsdp1_full(folder: str, out: Path, count: int) -> None:
    """FSDP1's full state dict, as accelerate names it."""
    model = FSDP(model_at(folder), device_id=torch.device("cpu"), use_orig_params=True)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        state = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, out / "pytorch_model_fsdp.bin")


def two_ways(folder: str, out: Path, count: int) -> None:
    """Matrices split by columns or by rows, and the rest on every rank: bare names, without the optimizer."""
    mesh = init_device_mesh("cpu", (count,))
    state = {}
    for index, (name, value) in enumerate(model_at(folder).state_dict().items()):
        split = [Shard(1 - index % 2)] if value.ndim == 2 else [Replicate()]
        state[name] = distribute_tensor(value, mesh, split)
    dcp.save(state, checkpoint_id=out)


def a_grid(folder: str, out: Path, count: int) -> None:
    """A mesh of two axes: rows along one, columns along the other."""
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("dp", "tp"))
    state = {
        name: distribute_tensor(value, mesh, [Shard(0), Shard(1)] if value.ndim == 2 else [Replicate(), Shard(0)])
        for name, value in model_at(folder).state_dict().items()
        if value.ndim
    }
    torch.save(state, out / f"model_world_size_{count}_rank_{dist.get_rank()}.pt")


def ranks(folder: str, out: Path, count: int) -> None:
    """verl's files (verl/utils/checkpoint/fsdp_checkpoint_manager.py): each rank saves its shares."""
    model = model_at(folder)
    fully_shard(model, mesh=init_device_mesh("cpu", (count,), mesh_dim_names=("fsdp",)))
    state = model.state_dict()
    assert any(isinstance(value, DTensor) for value in state.values())
    torch.save(state, out / f"model_world_size_{count}_rank_{dist.get_rank()}.pt")


def hf_dcp(folder: str, out: Path, count: int) -> None:
    """`save_pretrained(distributed_checkpoint=True)`."""
    from transformers.distributed import DistributedConfig

    shared = DistributedConfig(fsdp_size=count)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, distributed_config=shared, device_map="cpu"
    )
    model.save_pretrained(out, distributed_checkpoint=True)


def safetensors_writer(folder: str, out: Path, count: int) -> None:
    """torch's own HuggingFaceStorageWriter, columns and rows."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    mesh = init_device_mesh("cpu", (count,))
    state = {
        name: distribute_tensor(value, mesh, [Shard(index % 2)] if value.ndim == 2 else [Replicate()])
        for index, (name, value) in enumerate(model_at(folder).state_dict().items())
    }
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(path=str(out), save_distributed=True))


FORMS = {
    form.__name__: form
    for form in (
        fsdp2,
        accelerate_fsdp2,
        accelerate_fsdp1,
        fsdp1,
        fsdp1_full,
        two_ways,
        a_grid,
        ranks,
        hf_dcp,
        safetensors_writer,
    )
}


def work(rank: int, form: str, folder: str, out: str, count: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    Path(out).mkdir(parents=True, exist_ok=True)
    FORMS[form](folder, Path(out), count)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    name, source, target, processes = sys.argv[1:5]
    torch.multiprocessing.spawn(work, (name, source, target, int(processes), free), nprocs=int(processes))
