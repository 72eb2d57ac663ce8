"""The recipes under xtuner's names beside xtuner's own configs, field by field.

What is compared is the config that a run of the recipe writes and computes by: every field that either has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.resources import training
from tests.interop.peer_programs import in_peer

recipes = training("recipe")
IMAGE_TOKENS = (336 // 14) ** 2
NAMES = [name for name in recipes.recipe_names() if name != "tiny-shapes"]

# What makes up a run in mmengine; other names of a config are imports, and values that these have taken over.
RUN = (
    "model", "tokenizer", "image_processor", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg",
    "custom_hooks", "default_hooks", "env_cfg", "visualizer", "log_level", "load_from", "resume", "randomness",
    "log_processor", "batch_size", "accumulative_counts", "dataloader_num_workers", "max_epochs", "lr", "betas",
    "weight_decay", "max_norm", "warmup_ratio", "save_steps", "save_total_limit", "max_length", "data_root",
    "prompt_template", "llm_name_or_path", "visual_encoder_name_or_path", "optim_type",
)  # fmt: skip
# Fields of the originals alone: their answers to one picture of the web while they train (here: eval.every).
THEIRS_ALONE = ("custom_hooks.1",)
# Ours alone, at the values that the originals have by default (LLaVAModel, AdamW); pinned memory moves no number.
OURS_ALONE = {
    "model.projector_depth": 2,
    "model.visual_select_layer": -2,
    "model.pretrained_pth": None,
    "optim_wrapper.optimizer.eps": 1e-8,
    "train_dataloader.pin_memory": True,
    # xtuner loads the language model so where the GPU has bfloat16 (LLaVAModel._dispatch_lm_model_cfg).
    "model.llm.torch_dtype": "torch.bfloat16",
}
# Theirs and ours. `--deepspeed deepspeed_zero2 --seed 1024` of the published commands makes theirs ours: xtuner's
# train.py takes bfloat16 where the GPU has it.
DIFFERENT = {"optim_wrapper.dtype": ("float16", "bfloat16"), "randomness.seed": (None, 1024)}


@pytest.mark.peers
def test_every_field_is_the_originals(tmp_path: Path) -> None:
    written = {}
    for name in NAMES:
        (recipe,) = recipes.load_recipe(name)
        written[name] = str(tmp_path / f"{name}.py")
        text = training("xtuner_config").as_xtuner_config(recipe, image_tokens=IMAGE_TOKENS)
        Path(written[name]).write_text(text)
    found = in_peer("xtuner", "read_configs.py", written, tmp_path)
    for name in NAMES:
        theirs, ours = (of_the_run(found[name][side]) for side in ("theirs", "ours"))
        assert len(theirs) > 100
        for key in sorted(theirs.keys() | ours.keys()):
            if key in DIFFERENT:
                assert (theirs[key], ours[key]) == DIFFERENT[key], f"{name}: {key}"
            elif key in OURS_ALONE and key not in theirs:
                assert ours[key] == OURS_ALONE[key], f"{name}: {key}"
            elif not key.startswith(THEIRS_ALONE):
                assert theirs.get(key, "missing") == ours.get(key, "missing"), f"{name}: {key}"


def of_the_run(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that make up a run. A path is the same with and without ./, a work_dir is its last checkpoint.

    The original of the single card's second stage names `558128.pth`, which its first stage never writes.
    """
    return {
        key: re.sub(r"^\./|/(iter_)?\d+\.pth$", "", value) if isinstance(value, str) else value
        for key, value in fields.items()
        if key.partition(".")[0] in RUN
    }


def test_second_stages_start_from_the_first() -> None:
    """Each names the work_dir that the first stage's command makes by default, whatever it trained on."""
    for name in NAMES:
        (recipe,) = recipes.load_recipe(name)
        if name.endswith("pretrain"):
            assert not recipe.model.pretrained
        else:
            first = Path(recipe.model.pretrained)
            assert first.parent == Path("work_dirs") and first.name in NAMES and first.name.endswith("pretrain")


@pytest.mark.peers
def test_every_config_has_a_recipe(tmp_path: Path) -> None:
    written = in_peer("xtuner", "write_recipes.py", {"names": []}, tmp_path)
    assert len(written) == 33
    assert set(written) == set(NAMES)
