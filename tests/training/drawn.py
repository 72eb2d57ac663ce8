"""Recipes for the committed tiny models, on pictures and conversations that are drawn here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from llava_convert.core.resources import training

recipes = training("recipe")
WORDS = ("a", "red", "boat", "on", "the", "sea", "and", "two", "small", "hats", "in", "front", "of", "old", "trees")
# Without dropout, so that runs of different programs can be compared.
VIT_LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
LLM_LORA = {"r": 6, "alpha": 9, "dropout": 0.0}
# What is trained of the language model and the tower: all the combinations of the published recipes, and both whole.
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "full_vitlora": {"freeze_llm": False, "visual_encoder_lora": VIT_LORA},
    "llmlora_vitlora": {"llm_lora": LLM_LORA, "visual_encoder_lora": VIT_LORA},
    "full_fullvit": {"freeze_llm": False, "freeze_visual_encoder": False},
}


def draw(folder: Path, count: int = 8, *, alike: Any = None) -> Path:
    """`train.json` and its pictures of several shapes; answers of five to twelve words, of 20 tokens with a tokenizer.

    With answers of one length the mean over a batch is the mean of its halves' means.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(3)
    rows = []
    for number in range(count):
        size = chosen.choice([(72, 56), (56, 80), (64, 64)])
        Image.frombytes("RGB", size, chosen.randbytes(3 * size[0] * size[1])).save(folder / f"{number}.png")
        answer = " ".join(chosen.choices(WORDS, k=chosen.randint(5, 12)))
        while alike is not None and len(alike(answer, add_special_tokens=False)["input_ids"]) != 20:
            answer = " ".join(chosen.choices(WORDS, k=chosen.randint(5, 12)))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def recipe(tiny: Path, data: Path, kind: str, *, model: dict[str, Any] | None = None, **train: Any) -> Any:
    """A recipe of one of KINDS on the data in a folder."""
    parts = {**KINDS[kind], **(model or {})}
    for part in ("llm_lora", "visual_encoder_lora"):
        if part in parts:
            parts[part] = recipes.Lora(**parts[part])
    settings = {
        "batch_size": 2,
        "lr": 1e-3,
        "warmup_ratio": 0.25,
        "warmup_start": 0.5,
        "mmengine_warmup": True,
        "save_steps": 2,
        "keep": -1,
    }
    return recipes.Recipe(
        kind,
        recipes.ModelRecipe(str(tiny / "llm"), str(tiny / "vit"), **parts),
        recipes.DataRecipe((recipes.DataSet("all", "train.json"),), root=str(data), workers=0),
        recipes.TrainRecipe(**{**settings, "dtype": "fp32", **train}),
    )
