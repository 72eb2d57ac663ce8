"""Values of known keys are of the types that the tables give them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import InputError
from llava_convert.core.resources import data_dir
from llava_convert.model.tables.types import check_types, key_types, read_config
from llava_convert.storage.sidecars import folder_sidecars

WRONG = [
    ("config.json", "rms_norm_eps", []),
    ("config.json", "rms_norm_eps", "1e-5"),
    ("config.json", "rms_norm_eps", 1e308),
    ("config.json", "rms_norm_eps", None),
    ("config.json", "rope_theta", "x"),
    ("config.json", "rope_theta", -1),
    ("config.json", "rope_scaling", 3),
    ("config.json", "max_position_embeddings", 2.0),
    ("config.json", "max_position_embeddings", -1),
    ("config.json", "max_position_embeddings", 2**40),
    ("config.json", "hidden_act", 5),
    ("config.json", "tie_word_embeddings", "yes"),
    ("config.json", "eos_token_id", [-1]),
    ("config.json", "eos_token_id", {}),
    ("config.json", "bos_token_id", -5),
    ("config.json", "layer_types", [1]),
    ("config.json", "mm_projector_type", 5),
    ("config.json", "mm_vision_select_layer", 2**40),
    ("config.json", "depth", True),
    ("config.json", "image_grid_pinpoints", [336, 672]),
    ("generation_config.json", "eos_token_id", [2**40]),
    ("generation_config.json", "temperature", -1e308),
    ("preprocessor_config.json", "image_mean", "x"),
    ("preprocessor_config.json", "image_mean", [None, 0.5, 0.5]),
    ("preprocessor_config.json", "image_std", [0.5]),
    ("preprocessor_config.json", "size", {}),
    ("tokenizer_config.json", "bos_token", 3),
    ("tokenizer_config.json", "model_max_length", "long"),
    ("adapter_config.json", "lora_alpha", 10**400),
    ("adapter_config.json", "alpha_pattern", {"q_proj": 10**400}),
]
# What real configs say, though it looks odd.
SOUND = [
    ("config.json", "pad_token_id", -1),
    ("config.json", "rope_scaling", None),
    ("config.json", "num_key_value_heads", None),
    ("config.json", "eos_token_id", [1, 2]),
    ("config.json", "rms_norm_eps", 1),
    ("config.json", "image_token_index", -200),
    ("config.json", "image_grid_pinpoints", "(1x1),...,(6x6)"),
    ("config.json", "vision_feature_layer", [-2, -5]),
    ("preprocessor_config.json", "size", 224),
    ("tokenizer_config.json", "model_max_length", 10**30),
    ("tokenizer_config.json", "eos_token", {"__type": "AddedToken", "content": "</s>"}),
    ("adapter_config.json", "target_modules", "all-linear"),
    ("config.json", "a_key_of_tomorrow", object),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_wrong_value_is_named_with_key_and_file(file: str, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"folder/{file}: {key} should be .*, found ") as caught:
        check_types({key: value}, file, f"folder/{file}")
    assert caught.value.exit_code == 3 and caught.value.hint and len(caught.value.message) < 200


@pytest.mark.parametrize(("file", "key", "value"), SOUND)
def test_what_real_files_say_passes(file: str, key: str, value: Any) -> None:
    check_types({key: value}, file, file)


def test_a_nested_value_is_named_by_its_path() -> None:
    with pytest.raises(InputError, match=r"x: text_config\.rope_scaling\.factor should be a number"):
        check_types({"text_config": {"rope_scaling": {"factor": "8"}}}, "config.json", "x")


def test_a_file_is_checked_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1]}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id should be .* found \[-1\]"):
        read_config(folder_sidecars(tmp_path), "generation_config.json")


def test_every_key_that_decides_a_small_file_has_a_type() -> None:
    """Of config.json, what the language model and the tower compute by; names and dimensions alike."""
    for name in ("language_model", "vision_tower"):
        table = tomllib.loads((data_dir("mappings") / "facts" / f"{name}.toml").read_text(encoding="utf-8"))
        decides = {key for kind in ("computes", "prompts", "stops") for key in table.get(kind, ())}
        assert decides - key_types("config.json").keys() == {"quantization_config"}
