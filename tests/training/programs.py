"""Our trainer and the real xtuner as programs of their own: several processes, other environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_convert.core.resources import training
from tests.conftest import CHECKOUT
from tests.interop.peer_programs import PEERS, in_peer

recipes, checkpoint = training("recipe"), training("checkpoint")


OURS = ("-m", "llava_convert")


def environment(**more: str) -> dict[str, str]:
    """That of a process which trains: this package on the path, one thread, the CPU."""
    fixed = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **more}


def command(recipe: Any, work_dir: Path, *options: str, program: Sequence[str] = OURS) -> list[str]:
    """The words behind `python`: the recipe goes into a file beside the work_dir."""
    file = work_dir.with_name(f"{work_dir.name}.toml")
    file.write_text(recipes.as_toml(recipe))
    return [*program, "train", str(file), "--work-dir", str(work_dir), *options]


def train(
    recipe: Any,
    work_dir: Path,
    *options: str,
    processes: int = 1,
    peer: str = "",
    program: Path | None = None,
    fails: bool = False,
    more: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run our trainer, by torchrun where there are several processes; `peer` is an environment of .venvs.

    `program` is a script that stands in for `-m llava_convert`; `more` is for the environment.
    """
    python = str(PEERS / peer / "bin/python") if peer else sys.executable
    if not Path(python).is_file():
        pytest.skip(f"no environment {peer}: `make peers` builds it")
    more = {**(more or {}), **({"TORCH_EXTENSIONS_DIR": str(PEERS / peer / "extensions")} if peer else {})}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ours = command(recipe, work_dir, *options, program=[str(program)] if program else OURS)
    words = [python, *(torchrun if processes > 1 else []), *ours]
    done = subprocess.run(words, env=environment(**more), capture_output=True, text=True, cwd=work_dir.parent)
    assert (done.returncode != 0) == fails, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    return done


def losses(work_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work_dir / "log.jsonl").read_text().splitlines()]


def xtuner(cwd: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Have the real xtuner do these jobs (tests/peers/run_xtuner.py), all of which must succeed."""
    cwd.mkdir(exist_ok=True)
    found: Any = in_peer("xtuner", "run_xtuner.py", list(jobs), cwd)
    for number, (job, outcome) in enumerate(zip(jobs, found, strict=True)):
        assert outcome["done"], f"{job}:\n{outcome['error']}\n{(cwd / f'job{number}.log').read_text()[-3000:]}"
    return list(found)


def convert(config: Path, source: Path, out: Path, layout: str) -> dict[str, Any]:
    """A job: the real xtuner's conversion."""
    return {"convert": str(config), "checkpoint": str(source), "out": str(out), "format": layout}


# A key's bias adds the same to every score of a query, which the softmax takes off again: its gradient is nothing but
# rounding, of which AdamW makes steps as large as any. Measured: 3e-6 beside 3e-8 elsewhere, or 0 on another machine.
ROUNDING_ALONE = "k_proj.bias"


def furthest(ours: Path, theirs: Path, *, every: bool = False) -> float:
    """The largest difference between the weights of two `.pth`, whose names must be the same.

    Without `every`, those that rounding alone moves are left out.
    """
    return max(float(difference.max()) for difference in _differences(ours, theirs, every=every))


def typically(ours: Path, theirs: Path) -> float:
    """The mean difference between the weights of two `.pth`: not moved by single weights, of which one may be far."""
    found = list(_differences(ours, theirs, every=False))
    return float(sum(d.sum() for d in found)) / sum(d.numel() for d in found)


def _differences(ours: Path, theirs: Path, *, every: bool) -> Iterator[torch.Tensor]:
    one, other = checkpoint.read_checkpoint(ours).state, checkpoint.read_checkpoint(theirs).state
    assert list(one) == list(other)
    assert [t.dtype for t in one.values()] == [t.dtype for t in other.values()]
    for name in one:
        if every or not name.endswith(ROUNDING_ALONE):
            yield (one[name].float() - other[name].float()).abs()
