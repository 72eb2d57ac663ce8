"""What was meant: the recipe or the key of a recipe that is nearest to what was typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

# The words of other trainers (transformers' TrainingArguments, LLaVA's and xtuner's own) for keys of a recipe.
KNOWN_AS = {
    "learning_rate": "train.lr",
    "mm_projector_lr": "train.lr_projector",
    "mm_vision_tower_lr": "train.lr_visual_encoder",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "accumulative_counts": "train.accumulate",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.max_iters",
    "max_grad_norm": "train.max_norm",
    "adam_epsilon": "train.eps",
    "save_total_limit": "train.keep",
    "logging_steps": "train.log_every",
    "report_to": "train.trackers",
    "eval_steps": "eval.every",
    "model_max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataloader_num_workers": "data.workers",
    "image_aspect_ratio": "data.pad_image_to_square",
    "template": "data.prompt_template",
    "model_name_or_path": "model.llm",
    "llm_name_or_path": "model.llm",
    "vision_tower": "model.visual_encoder",
    "visual_encoder_name_or_path": "model.visual_encoder",
    "pretrained_pth": "model.pretrained",
    "pretrain_mm_mlp_adapter": "model.pretrained",
    "mm_vision_select_layer": "model.select_layer",
    "visual_select_layer": "model.select_layer",
    "attn_implementation": "model.attention",
    "lora_r": "model.llm_lora.r",
    "lora_alpha": "model.llm_lora.alpha",
    "lora_dropout": "model.llm_lora.dropout",
}


def nearest_key(typed: Sequence[str], known: Iterable[str]) -> str:
    """The dotted key that was meant. A word of another trainer is known by its meaning."""
    last = typed[-1].replace("-", "_")
    if last in KNOWN_AS:
        return KNOWN_AS[last]
    wanted = ".".join(typed)
    # The last word says most: `finetun.train.lr` is about a stage and not about `name`.
    return max(known, key=lambda key: (_likeness(last, key.rpartition(".")[2]) + _likeness(wanted, key), key))


def nearest_recipe(typed: str, known: Sequence[str]) -> str:
    """The recipe that was meant: what has the typed words counts before what looks alike as a whole."""
    words = _words(typed)

    def score(name: str) -> tuple[float, int]:
        parts = _words(name)
        alike = sum(max(_likeness(word, part) for part in parts) for word in words) / max(1, len(words))
        return alike, -len(name)

    return max(known, key=score)


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word]


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
