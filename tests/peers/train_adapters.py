"""Has the trainers that people use train LoRA over a LLaVA of transformers for two steps, and leave what they leave.

A job as JSON on stdin: `trainer`, a name in TRAINERS; `base`, a transformers LLaVA; `out`, the run's folder; `options`,
of peft's LoraConfig or the trainer's own. The result names the logits that peft computes with the last adapter.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from save_adapters import VARIANTS, logits
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

STEPS = 2
RANK = {"r": 4, "lora_alpha": 8}
RATE = 0.02  # by which two steps move the logits well beyond what float32 rounds


def _pictures(folder: Path) -> list[Path]:
    source = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(4):
        found.append(folder / f"{index}.png")
        Image.frombytes("RGB", (56, 56), source.randbytes(3 * 56 * 56)).save(found[-1])
    return found


def by_transformers(base: Path, out: Path, options: dict[str, Any]) -> None:
    """The plain Trainer, which saves at each step; `variant` is one of save_adapters."""
    model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    picture_token = model.config.image_token_index
    model = get_peft_model(model, LoraConfig(**RANK, **VARIANTS[options["variant"]]))
    torch.manual_seed(3)
    rows = []
    for _ in range(4):
        ids = torch.randint(3, 200, (24,))
        labels = ids.clone()
        ids[4:20], labels[4:20] = picture_token, -100
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "pixel_values": torch.randn(3, 56, 56),
            }
        )
    arguments = TrainingArguments(
        str(out),
        max_steps=STEPS,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=RATE,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()


def by_trl(base: Path, out: Path, options: dict[str, Any]) -> None:
    """TRL's SFTTrainer, which makes the adapter itself of a config."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "images": [Image.open(picture)],
            "prompt": [{"role": "user", "content": "What is in this picture?"}],
            "completion": [{"role": "assistant", "content": "A cat and a table."}],
        }
        for picture in _pictures(out.parent / "pictures")
    ]
    arguments = SFTConfig(
        str(out),
        max_steps=STEPS,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=RATE,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        str(base),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(base),
        peft_config=LoraConfig(**RANK, **options),
    )
    trainer.train()
    trainer.save_model()


def by_llamafactory(base: Path, out: Path, options: dict[str, Any]) -> None:
    """`llamafactory-cli train`, as a function."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # of what it does not use here
    from llamafactory.train.tuner import run_exp

    data = out.parent / "data"
    pictures = _pictures(data)
    talk = [
        {"role": "user", "content": "<image>What is in this picture?"},
        {"role": "assistant", "content": "A cat and a table."},
    ]
    (data / "rows.json").write_text(json.dumps([{"messages": talk, "images": [str(each)]} for each in pictures]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": tags,
    }
    (data / "dataset_info.json").write_text(json.dumps({"rows": rows}))
    run_exp(
        {
            "model_name_or_path": str(base),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": RANK["r"],
            "lora_alpha": RANK["lora_alpha"],
            "template": "llava",
            "dataset": "rows",
            "dataset_dir": str(data),
            "output_dir": str(out),
            "max_steps": STEPS,
            "save_steps": 1,
            "per_device_train_batch_size": 1,
            "learning_rate": RATE,
            "report_to": "none",
            "use_cpu": True,
            "preprocessing_num_workers": 1,
            **options,
        }
    )


def by_swift(base: Path, out: Path, options: dict[str, Any]) -> None:
    """`swift sft`, as a function."""
    from swift import SftArguments, sft_main

    data = out.parent / "data"
    talk = [
        {"role": "user", "content": "<image>What is in this picture?"},
        {"role": "assistant", "content": "A cat and a table."},
    ]
    rows = [{"messages": talk, "images": [str(each)]} for each in _pictures(data)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft_main(
        SftArguments(
            model=str(base),
            model_type="llava1_5_hf",
            dataset=[str(data / "rows.jsonl")],
            output_dir=str(out),
            add_version=False,
            tuner_type="lora",
            lora_rank=RANK["r"],
            lora_alpha=RANK["lora_alpha"],
            max_steps=STEPS,
            save_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=RATE,
            torch_dtype="float32",
            report_to=[],
            use_cpu=True,
            dataset_num_proc=1,
            dataloader_num_workers=0,
            split_dataset_ratio=0,
            **options,
        )
    )


TRAINERS: dict[str, Callable[[Path, Path, dict[str, Any]], None]] = {
    "transformers": by_transformers,
    "trl": by_trl,
    "llamafactory": by_llamafactory,
    "swift": by_swift,
}


def applied(base: Path, adapter: Path) -> list[Any]:
    """The logits of base and adapter, as peft applies it."""
    model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    config = model.config
    found: list[Any] = logits(PeftModel.from_pretrained(model, adapter).eval(), config).tolist()
    return found


if __name__ == "__main__":
    job = json.load(sys.stdin)
    base, out = Path(job["base"]), Path(job["out"])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    TRAINERS[job["trainer"]](base, out, job["options"])
    Path(sys.argv[1]).write_text(json.dumps({"logits": applied(base, out / f"checkpoint-{STEPS}")}))
