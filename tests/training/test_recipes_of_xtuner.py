"""The recipes under xtuner's names beside xtuner's own configs, number by number."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.resources import training
from tests.interop.peer_programs import in_peer

pytestmark = pytest.mark.peers

recipes = training("recipe")
IMAGE_TOKENS = (336 // 14) ** 2
NAMES = [name for name in recipes.recipe_names() if name != "tiny-shapes"]


def lora(found: Any) -> dict[str, Any] | None:
    kept = ("r", "alpha", "dropout", "bias")
    return None if found is None else {key: value for key, value in asdict(found).items() if key in kept}


def test_the_numbers_are_the_originals(tmp_path: Path) -> None:
    originals = in_peer("xtuner", "read_configs.py", {"names": NAMES}, tmp_path)
    for name in NAMES:
        (ours,) = recipes.load_recipe(name)
        theirs = originals[name]
        assert theirs is not None, name
        model, data, train = ours.model, ours.data, ours.train
        assert data.prompt_template in theirs.pop("templates"), name
        root = theirs.pop("data_root").removeprefix("./")
        sets = [{"file": f"{data.root}/{one.file}", "images": f"{data.root}/{one.images}"} for one in data.sets]
        assert root == f"{data.root}/" and theirs.pop("sets") == [
            {key: f"./{value}" for key, value in one.items()} for one in sets
        ], name
        assert theirs == {
            "llm": model.llm,
            "visual_encoder": model.visual_encoder,
            "freeze_llm": model.freeze_llm,
            "freeze_visual_encoder": model.freeze_visual_encoder,
            "llm_lora": lora(model.llm_lora),
            "visual_encoder_lora": lora(model.visual_encoder_lora),
            "quantized": bool(model.quantization),
            "max_length": data.max_length - IMAGE_TOKENS,
            "batch_size": train.batch_size,
            "accumulate": train.accumulate,
            "epochs": train.epochs,
            "lr": train.lr,
            "betas": list(train.betas),
            "weight_decay": train.weight_decay,
            "max_norm": train.max_norm,
            "warmup_ratio": train.warmup_ratio,
            "warmup_start": train.warmup_start,
            "save_steps": train.save_steps,
            "keep": train.keep,
        }, name


def test_every_config_has_a_recipe(tmp_path: Path) -> None:
    """But one, whose data are RefCOCO's boxes: no set of conversations holds them."""
    written = in_peer("xtuner", "write_recipes.py", {"names": []}, tmp_path)
    assert len(written) == 33
    lacking = {name for name in written if name not in NAMES}
    assert lacking == {name for name, text in written.items() if text is None}
    assert [name.rpartition("_")[2] for name in lacking] == ["refcoco"]
