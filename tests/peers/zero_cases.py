"""Have the real DeepSpeed 0.14.4 write checkpoint folders that the golden ones lack: ZeRO-1, more ranks, groups, fp16.

Run with the environment's Python: `.venvs/xtuner/bin/python tests/peers/zero_cases.py [OUT]`; OUT is .venvs/cases-zero
by default. Each case becomes `OUT/<case>/{latest,iter_2.pth/}`, with `masters.pt` beside it: what DeepSpeed's own
zero_to_fp32 makes of it. The model is no LLaVA, only awkward: odd sizes, a tied head, frozen parameters, a buffer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

CHECKOUT = Path(__file__).resolve().parents[2]
TAG = "iter_2.pth"


@dataclass(frozen=True)
class Case:
    """How a run is set up. `frozen` saves frozen parameters too, which xtuner never does."""

    stage: int
    ranks: int
    frozen: bool = False
    groups: bool = False
    half: str = "bf16"
    zero: tuple[tuple[str, Any], ...] = ()


CASES: dict[str, Case] = {
    "zero1_ranks2": Case(1, 2),
    "zero1_ranks3_groups": Case(1, 3, groups=True),
    "zero1_ranks3_frozen": Case(1, 3, frozen=True),
    "zero2_ranks1": Case(2, 1, groups=True),
    "zero2_ranks3": Case(2, 3),
    "zero2_ranks3_groups_frozen": Case(2, 3, frozen=True, groups=True),
    "zero2_ranks5": Case(2, 5),
    "zero2_ranks3_round_robin": Case(2, 3, groups=True, zero=(("round_robin_gradients", True),)),
    "zero3_ranks1_frozen": Case(3, 1, frozen=True),
    "zero3_ranks3": Case(3, 3),
    "zero3_ranks3_groups_frozen": Case(3, 3, frozen=True, groups=True),
    "zero3_ranks5_frozen_sub_groups": Case(3, 5, frozen=True, groups=True, zero=(("sub_group_size", 10),)),
    "zero2_ranks3_fp16": Case(2, 3, groups=True, half="fp16"),
}


class Odd(nn.Module):
    """Sizes that no number of ranks divides; `head` is tied, `base` frozen, `scale` a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.base = nn.Linear(7, 7)
        self.up = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.down = nn.Linear(11, 7, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.base.requires_grad_(False)
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("shift", torch.linspace(0, 1, 7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.base(self.embed(ids)) + self.shift
        return self.head(self.down(self.norm(self.up(x))) * self.scale).float().logsumexp(-1).mean()


def _config(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, "overlap_comm": False, **dict(case.zero)},
        case.half: {"enabled": True, **({"initial_scale_power": 4} if case.half == "fp16" else {})},
        "steps_per_print": 10**9,
    }


def _run_rank(rank: int, case: Case, folder: Path, port: int) -> None:
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "MASTER_ADDR": "127.0.0.1"}
    # With LOCAL_SIZE it does not ask numactl, which may not be installed, how many CPUs there are.
    settings |= {"MASTER_PORT": port, "LOCAL_SIZE": case.ranks}
    os.environ.update({name: str(value) for name, value in settings.items()})
    torch.set_num_threads(1)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Else a minute and a half goes into compiling what gloo does as well. (`deepspeed.comm.torch` itself is torch.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    # Only kept from those who would train in earnest: slow on a CPU.
    type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    type(deepspeed.get_accelerator()).supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(1)
    model = Odd()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[3:]}, {"params": trained[:3], "weight_decay": 0.1}] if case.groups else trained
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(case))
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randint(13, (4, 3), generator=generator)))
        engine.step()
    engine.save_checkpoint(
        str(folder), tag=TAG, client_state={"meta": {"iter": 2}}, exclude_frozen_parameters=not case.frozen
    )
    torch.distributed.barrier()


def make(name: str, case: Case, out: Path) -> None:
    """Train and save one case, and have DeepSpeed put it together again."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_run_rank, (case, folder, port), nprocs=case.ranks, start_method="fork")
    masters = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=not case.frozen)
    torch.save({key: value.detach().clone() for key, value in masters.items()}, folder / "masters.pt")


def main() -> None:
    """Make the cases with a line each on stderr; a case that DeepSpeed cannot make is told, with its logs kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=CHECKOUT / ".venvs" / "cases-zero")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args()
    for name in arguments.only or CASES:
        try:
            make(name, CASES[name], arguments.out)
            print(f"{name}: made", file=sys.stderr)
        except Exception as error:
            last = str(error).strip().splitlines()
            print(f"{name}: failed: {last[-1] if last else error!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
