"""Small files that trainers leave beside checkpoints: each is named, and its folder is the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_convert

# As LLaMA-Factory 0.9.5 and ms-swift 4.6.0 wrote them, shortened.
FILES: dict[str, tuple[dict[str, Any], str]] = {
    "args.json": (
        {"output_dir": "run", "learning_rate": 0.02, "model_type": "llava1_5_hf", "tuner_type": "lora"},
        "the arguments of a training",
    ),
    "all_results.json": ({"epoch": 0.5, "total_flos": 1.0, "train_loss": 7.7}, "the results of a training"),
    "trainer_log.jsonl": ({"current_steps": 1, "total_steps": 2, "loss": 7.9}, "the log of a training"),
    "logging.jsonl": ({"loss": 7.78, "token_acc": 0.09, "global_step/max_steps": "1/2"}, "the log of a training"),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_named(tmp_path: Path, name: str) -> None:
    content, kind = FILES[name]
    file = tmp_path / name
    file.write_text(json.dumps(content) + "\n")
    found = llava_convert.inspect(file)
    assert found.kind.startswith(kind)
    assert found.next == f"llava-convert inspect {tmp_path}"
