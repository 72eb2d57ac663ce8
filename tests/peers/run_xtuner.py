"""Have the real xtuner train and convert: jobs as JSON on stdin, what became of each as JSON in the file named.

Run with the environment's Python: `.venvs/xtuner/bin/python tests/peers/run_xtuner.py RESULT < JOBS`. A job is
`{"train": CONFIG, "work_dir": DIR, "resume": PTH, "options": {…}, "bf16": true}` or
`{"convert": CONFIG, "checkpoint": PTH, "out": DIR, "format": NAME}`; each runs in a forked child, in order, through the
main functions behind `xtuner train` and `xtuner convert pth_to_hf`; of a training it is told which samples were taken,
by their rows' ids, in order. Nothing of xtuner is changed, but that its AmpOptimWrapper may do without an accelerator
where `bf16` asks for an autocast on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper
from xtuner.dataset import LLaVADataset
from xtuner.tools import train
from xtuner.tools.model_converters import pth_to_hf
from xtuner_cases import _in_child, _last_line


def _losses(work_dir: Path) -> list[float]:
    """What the run logged for each of its iterations, those before a resume included."""
    newest = Path((work_dir / "last_checkpoint").read_text())
    hub = torch.load(newest, map_location="cpu")["message_hub"]
    return [float(value) for value in hub["log_scalars"]["train/loss"].data[0]]


def _train(job: dict[str, Any]) -> None:
    sys.argv = ["train", job["train"], "--work-dir", job["work_dir"]]
    sys.argv += ["--resume", job["resume"]] if job.get("resume") else []
    options = [f"{key}={value}" for key, value in job.get("options", {}).items()]
    sys.argv += ["--cfg-options", *options] if options else []
    if job.get("bf16"):
        sys.modules[AmpOptimWrapper.__module__].is_cuda_available = lambda: True
    taken: list[str] = []
    getitem = LLaVADataset.__getitem__

    def noted(self: Any, index: int) -> Any:
        sample = getitem(self, index)
        taken.append(sample["id"])
        return sample

    LLaVADataset.__getitem__ = noted
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(job.get("bf16"))):
        train.main()
    work_dir = Path(job["work_dir"])
    (work_dir / "samples.json").write_text(json.dumps(taken))
    (work_dir / "losses.json").write_text(json.dumps(_losses(work_dir)))


def _convert(job: dict[str, Any]) -> None:
    sys.argv = ["pth_to_hf", job["convert"], job["checkpoint"], job["out"], "--save-format", job["format"]]
    sys.argv.append("--safe-serialization")
    pth_to_hf.main()


def main() -> None:
    jobs = json.load(sys.stdin)
    found = []
    for number, job in enumerate(jobs):
        log = Path(f"job{number}.log")
        work = _train if "train" in job else _convert
        done = _in_child(lambda work=work, job=job: work(job), log)
        outcome: dict[str, Any] = {"done": done, "error": "" if done else _last_line(log)}
        if done and "train" in job:
            for what in ("losses", "samples"):
                outcome[what] = json.loads((Path(job["work_dir"]) / f"{what}.json").read_text())
        found.append(outcome)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
