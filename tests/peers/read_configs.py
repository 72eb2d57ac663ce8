"""Read xtuner's own configs by mmengine: `read_configs.py RESULT`, with {"names": [...]} on stdin.

RESULT gets, by name, the numbers which a recipe has too; null for a name that xtuner does not have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xtuner
from mmengine.config import Config
from xtuner.utils import PROMPT_TEMPLATE

FOLDER = Path(xtuner.__file__).parent / "configs"


def sets_of(dataset: Any) -> list[dict[str, Any]]:
    """File and picture folder of each set, in order."""
    inner = dataset.get("datasets")
    if inner is not None:
        return [one for each in inner for one in sets_of(each)]
    return [{"file": dataset["data_path"], "images": dataset["image_folder"]}]


def lora_of(part: Any) -> dict[str, Any] | None:
    return part and {"r": part["r"], "alpha": part["lora_alpha"], "dropout": part["lora_dropout"], "bias": part["bias"]}


def read(name: str) -> dict[str, Any] | None:
    found = next(iter(sorted(FOLDER.rglob(f"{name}.py"))), None)
    if found is None:
        return None
    config = Config.fromfile(str(found))
    model, wrapper = config.model, config.optim_wrapper
    warm, _ = config.param_scheduler
    return {
        "llm": config.llm_name_or_path,
        "visual_encoder": config.visual_encoder_name_or_path,
        "freeze_llm": model.freeze_llm,
        "freeze_visual_encoder": model.freeze_visual_encoder,
        "llm_lora": lora_of(model.get("llm_lora")),
        "visual_encoder_lora": lora_of(model.get("visual_encoder_lora")),
        "quantized": "quantization_config" in model.llm,
        # By content: several names have the same.
        "templates": [key for key, value in PROMPT_TEMPLATE.items() if value == config.prompt_template],
        "max_length": config.max_length,
        "sets": sets_of(config.train_dataloader.dataset),
        "data_root": config.data_root,
        "batch_size": config.train_dataloader.batch_size,
        "accumulate": wrapper.accumulative_counts,
        "epochs": config.train_cfg.max_epochs,
        "lr": wrapper.optimizer.lr,
        "betas": list(wrapper.optimizer.betas),
        "weight_decay": wrapper.optimizer.weight_decay,
        "max_norm": wrapper.clip_grad.max_norm,
        "warmup_ratio": warm.end / config.train_cfg.max_epochs,
        "warmup_start": warm.start_factor,
        "save_steps": config.default_hooks.checkpoint.interval,
        "keep": config.default_hooks.checkpoint.max_keep_ckpts,
    }


def main() -> None:
    job = json.load(sys.stdin)
    Path(sys.argv[1]).write_text(json.dumps({name: read(name) for name in job["names"]}))


if __name__ == "__main__":
    main()
