"""HF's Trainer with the real DeepSpeed, two steps of a transformers LLaVA on the CPU; run in `.venvs/deepspeed`.

python train_deepspeed.py MODEL OUT STAGE TIED PROCESSES

OUT gets `checkpoint-2` as the Trainer leaves it, and `fp32/`: what the `zero_to_fp32.py` within it writes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments


class Lines(torch.utils.data.Dataset[dict[str, Any]]):
    """Random tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(5, 90, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def work(rank: int, folder: str, out: str, stage: int, tied: bool, count: int, port: int) -> None:
    # DeepSpeed does without its faster sums, which would be compiled for a minute.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    # With LOCAL_SIZE it does not ask numactl, which may not be installed, how many CPUs there are.
    os.environ.update({name: str(value) for name, value in {**fixed, "LOCAL_SIZE": count}.items()})
    config = {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        out,
        deepspeed=config,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        bf16=True,
        use_cpu=True,
        report_to=[],
        ddp_backend="gloo",
    )
    torch.manual_seed(3)
    if tied:
        shape = LlavaConfig.from_pretrained(folder)
        shape.tie_word_embeddings = shape.text_config.tie_word_embeddings = True
        model = LlavaForConditionalGeneration(shape)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    Trainer(model, arguments, train_dataset=Lines()).train()


if __name__ == "__main__":
    name, target, wanted, ties, processes = sys.argv[1:6]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    known = (name, target, int(wanted), ties == "tied", int(processes), free)
    torch.multiprocessing.spawn(work, known, nprocs=int(processes))
    saved = Path(target, "checkpoint-2")
    merged = Path(target, "fp32")
    merged.mkdir()
    shutil.copy(saved / "config.json", merged)
    written = merged / "pytorch_model.bin"
    loads = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # torch 2.6 and later refuse its pickles otherwise
    subprocess.run([sys.executable, saved / "zero_to_fp32.py", saved, written], check=True, env=loads)
