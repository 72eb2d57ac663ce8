"""Models as several processes save them, by torch itself: each writes its part of every tensor.

python -m benchmarks.shares FOLDER BYTES FORM PROCESSES
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.make import Values, write_official, write_tower_config
from benchmarks.shapes import deep_shape_for

FORMS = ("rows", "columns", "hf-columns")
"""Matrices split by rows, as FSDP splits them, or by columns; the last in safetensors."""
PROCESSES = 2


def make_shares(folder: Path, nbytes: int, form: str) -> None:
    """`saved`, the checkpoint, and `config`, a model folder of holes whose config and tokenizer belong to it."""
    shape = deep_shape_for(nbytes, 2, 2)
    (folder / "config").mkdir()
    write_official(folder / "config", shape, "BF16", nbytes, None)
    write_tower_config(folder / "tower", shape)
    command = [sys.executable, "-m", "benchmarks.shares", folder / "saved", str(nbytes), form, str(PROCESSES)]
    subprocess.run(list(map(str, command)), check=True)


def work(rank: int, folder: str, nbytes: int, form: str, count: int, port: int) -> None:
    """One process: its part of every tensor, then its file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    mesh, values = init_device_mesh("cpu", (count,)), Values("BF16")
    shape, state = deep_shape_for(nbytes, 2, 2), {}
    named = {f"model.vision_tower.vision_tower.{name}": size for name, size in shape.tower().items()}
    named |= {f"model.mm_projector.{name}": size for name, size in shape.projector().items()} | shape.llm()
    dim = int("columns" in form)
    for name, whole in named.items():
        split = Shard(dim) if len(whole) == 2 and whole[dim] % count == 0 else Replicate()
        part = tuple(n // count if split.is_shard(at) else n for at, n in enumerate(whole))
        state[name] = DTensor.from_local(values.tensor(part), mesh, [split], run_check=False)
    if form.startswith("hf-"):
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(path=folder, save_distributed=True))
    else:
        dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    target, size, wanted, processes = sys.argv[1:5]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (target, int(size), wanted, int(processes), free), nprocs=int(processes))
