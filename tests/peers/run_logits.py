"""Logits of `hf` folders by this environment's transformers: `run_logits.py RESULT`, with a job on stdin.

The job has `models` (name -> {folder, ids}), `pixels` (.npy) and `folder`, where logits go by name. Ids have a token
for every feature of the picture. RESULT gets the version, and by name the keys that were missing or left over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlavaForConditionalGeneration

KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def run(name: str, model_job: dict[str, Any], job: dict[str, Any]) -> list[str]:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        model_job["folder"], torch_dtype=torch.float32, output_loading_info=True
    )
    ids = torch.tensor([model_job["ids"]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        logits = model.eval()(**given, pixel_values=torch.from_numpy(np.load(job["pixels"]))).logits[0]
    np.save(Path(job["folder"], f"{name}.npy"), logits.numpy())
    return [f"{kind}: {key}" for kind in KINDS for key in sorted(map(str, report[kind]))]


def main() -> None:
    """Run the job."""
    transformers.logging.set_verbosity_error()
    job = json.load(sys.stdin)
    keys = {name: run(name, each, job) for name, each in job["models"].items()}
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, "keys": keys}))


if __name__ == "__main__":
    main()
