"""A fact that decides what a model computes, how it is prompted or when it stops is carried, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.model.tables.facts import facts
from tests.field.conftest import Models, edit, edit_tensors

TARGETS = ("hf", "official", "xtuner", "gguf")
# Fact: a layout that states it, the key and a value that is not the default.
STATED: dict[str, tuple[str, str, Any]] = {
    "vision.feature_layer": ("hf", "vision_feature_layer", -1),
    "vision.feature_strategy": ("hf", "vision_feature_select_strategy", "full"),
    "projector.activation": ("hf", "projector_hidden_act", "relu"),
    "picture.aspect_ratio": ("official", "image_aspect_ratio", "anyres_max_9"),
    "vision.resampler": ("official", "mm_resampler_type", "spatial_pool"),
    "vision.scales": ("official", "s2", True),
    "prompt.start_and_end": ("official", "mm_use_im_start_end", True),
    "prompt.max_length": ("official", "tokenizer_model_max_length", 1111),
    "prompt.padding_side": ("official", "tokenizer_padding_side", "right"),
}
# Where each can go; it is refused everywhere else.
CARRIED = {
    "vision.feature_layer": {"hf", "official", "gguf", "xtuner"},  # xtuner: in the record
    "vision.feature_strategy": {"hf", "official"},
    "projector.activation": {"hf", "xtuner"},
    "picture.aspect_ratio": {"official"},
    "vision.resampler": {"official"},
    "vision.scales": {"official"},
    "prompt.start_and_end": {"official"},
    "prompt.max_length": {"hf", "official", "xtuner", "gguf"},
    "prompt.padding_side": {"hf", "official", "xtuner", "gguf"},
}


def stated(models: Models, folder: Path, fact: str) -> Path:
    layout, key, value = STATED[fact]
    return edit(models.copy(layout, folder), **{key: value})


@pytest.mark.parametrize("fact", STATED)
@pytest.mark.parametrize("to", TARGETS)
def test_one_fact_goes_there_and_comes_back_or_is_refused_by_name(
    models: Models, tmp_path: Path, fact: str, to: str
) -> None:
    layout, key, value = STATED[fact]
    source = stated(models, tmp_path / "source", fact)
    more: dict[str, Any] = {"visual_encoder": models.tower} if layout == "official" and to != "official" else {}
    if to == layout:
        more["max_shard_size"] = "5GB"  # to its own layout something has to be asked for
    if to not in CARRIED[fact]:
        with pytest.raises(UnsupportedError) as refused:
            llava_convert.convert(source, to=to, out=tmp_path / "out", **more)
        text = str(refused.value)
        assert key in text and json.dumps(value).strip('"') in text and facts()[fact].what in text
        able = [name for name in TARGETS if name in CARRIED[fact]]
        assert any(name in str(refused.value.hint) for name in able)
        assert not (tmp_path / "out").exists()
        return
    llava_convert.convert(source, to=to, out=tmp_path / "out", **more)
    assert llava_convert.verify(source, tmp_path / "out", **{k: v for k, v in more.items() if k == "visual_encoder"})
    if to == layout:
        assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == value
        return
    back: dict[str, Any] = {"llm": models["xtuner"], "visual_encoder": models.tower} if to == "xtuner" else {}
    if to == "xtuner":
        back = {}
    llava_convert.convert(tmp_path / "out", to=layout, out=tmp_path / "back", **back)
    assert json.loads((tmp_path / "back" / "config.json").read_text())[key] == value


def test_a_projector_without_biases(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("hf", tmp_path / "source"), multimodal_projector_bias=False)
    with pytest.raises(InputError, match=r"multimodal_projector_bias is false .* the projector's tensors say true"):
        llava_convert.convert(source, to="official", out=tmp_path / "out")
    edit_tensors(source, lambda t: {n: a for n, a in t.items() if not ("projector" in n and n.endswith("bias"))})
    for to in ("official", "gguf"):
        with pytest.raises(UnsupportedError, match="multimodal_projector_bias is false"):
            llava_convert.convert(source, to=to, out=tmp_path / "out")
    llava_convert.convert(source, to="xtuner", out=tmp_path / "xtuner")
    assert json.loads((tmp_path / "xtuner" / "projector" / "config.json").read_text())["bias"] is False
    llava_convert.convert(tmp_path / "xtuner", to="hf", out=tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["multimodal_projector_bias"] is False


def test_image_newline_goes_where_it_is_read_and_is_dropped_by_name_where_nothing_reads_it(
    models: Models, tmp_path: Path
) -> None:
    source = models.copy("official", tmp_path / "source")
    edit_tensors(source, lambda t: {**t, "model.image_newline": np.ones(64, np.float16)})
    report = llava_convert.convert(source, to="hf", out=tmp_path / "plain", visual_encoder=models.tower)
    assert any("image_newline" in note and "nothing reads it" in note for note in report.notes)
    assert any(
        gone["name"] == "image_newline"
        for gone in json.loads((tmp_path / "plain" / "conversion.json").read_text())["dropped"]
    )
    edit(source, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[56, 112]])
    for to in ("xtuner", "gguf"):
        with pytest.raises(UnsupportedError, match="image_aspect_ratio is anyres"):
            llava_convert.convert(source, to=to, out=tmp_path / "out", visual_encoder=models.tower)
    llava_convert.convert(source, to="hf", out=tmp_path / "next", visual_encoder=models.tower)
    assert json.loads((tmp_path / "next" / "config.json").read_text())["model_type"] == "llava_next"
    llava_convert.convert(source, to="official", out=tmp_path / "same", max_shard_size="5GB")
    assert llava_convert.verify(source, tmp_path / "same")
    verdict = llava_convert.verify(source, tmp_path / "plain", visual_encoder=models.tower)
    assert {"picture.aspect_ratio", "picture.newline"} <= set(verdict.facts)


@pytest.mark.parametrize("layer", [-5, 4, 99])
@pytest.mark.parametrize("to", ["official", "gguf", "xtuner"])
def test_a_layer_that_the_tower_does_not_have(models: Models, tmp_path: Path, layer: int, to: str) -> None:
    source = edit(models.copy("hf", tmp_path / "source"), vision_feature_layer=layer)
    with pytest.raises(InputError, match=rf"vision_feature_layer is {layer}, but the vision tower has 3 blocks"):
        llava_convert.convert(source, to=to, out=tmp_path / "out")


def test_a_layer_is_the_same_however_it_is_counted(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("hf", tmp_path / "source"), vision_feature_layer=2)  # of 0 to 3: the last but one
    llava_convert.convert(source, to="gguf", out=tmp_path / "gguf")
    assert llava_convert.verify(source, tmp_path / "gguf") and llava_convert.verify(models["hf"], tmp_path / "gguf")


def test_a_tower_that_the_flag_says_is_not_there(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("official", tmp_path / "source"), unfreeze_mm_vision_tower=False)
    report = llava_convert.convert(source, to="hf", out=tmp_path / "out", visual_encoder=models.tower)
    assert any("unfreeze_mm_vision_tower: false" in warning for warning in report.warnings)
    verdict = llava_convert.verify(models["official"], source)
    assert list(verdict.facts) == ["unfreeze_mm_vision_tower"]


def test_the_class_of_the_language_model_counts_and_a_contradiction_is_refused(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("official", tmp_path / "source"), architectures=["LlavaQwenForCausalLM"])
    with pytest.raises(
        UnsupportedError, match="model_type is llava_llama, but architectures names LlavaQwenForCausalLM"
    ):
        llava_convert.inspect(source)
    edit(source, model_type="llava")
    with pytest.raises(UnsupportedError, match=r"its config says qwen2 .* its tensors are those of .*llama"):
        llava_convert.inspect(source)
    edit(source, architectures=["LlavaLlamaForCausalLM"])
    assert llava_convert.inspect(source).settings["family"] == "llama"


@pytest.mark.parametrize(
    ("layout", "file", "values"),
    [
        ("official", "config.json", {"mm_token_gate": 0.5}),
        ("official", "config.json", {"some_switch": True}),
        ("hf", "config.json", {"image_gate": "on"}),
        ("hf", "config.json", {"text_config__some_switch": 3}),
        ("hf", "config.json", {"vision_config__some_switch": [1]}),
        ("xtuner", "projector/config.json", {"gate": 1.0}),
    ],
)
def test_a_key_that_no_table_knows(
    models: Models, tmp_path: Path, layout: str, file: str, values: dict[str, Any]
) -> None:
    source = edit(models.copy(layout, tmp_path / "source"), file, **values)
    name = next(iter(values)).rpartition("__")[2]
    more: dict[str, Any] = {"visual_encoder": models.tower} if layout != "hf" else {}
    to = "official" if layout == "hf" else "hf"
    with pytest.raises(UnsupportedError, match=name) as refused:
        llava_convert.convert(source, to=to, out=tmp_path / "out", **more)
    assert f"--allow-key {name}" in str(refused.value.hint) or "allow_key" in str(refused.value.hint)
    llava_convert.convert(source, to=to, out=tmp_path / "out", allow_key=name, **more)
    edit(source, file, **{key: False for key in values})
    llava_convert.convert(source, to=to, out=tmp_path / "out", force=True, **more)


def test_a_key_of_a_small_file_is_one_note(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("hf", tmp_path / "source"), "generation_config.json", strange_setting=3)
    edit(source, "preprocessor_config.json", odd=2)
    report = llava_convert.convert(source, to="official", out=tmp_path / "out")
    (note,) = [text for text in report.notes if "strange_setting" in text]
    assert "preprocessor_config.json: odd = 2" in note


def test_nothing_is_wrong_and_nothing_is_warned_of(models: Models, tmp_path: Path) -> None:
    for to in TARGETS:
        report = llava_convert.convert(models.pth, to=to, out=tmp_path / to, dry_run=True)
        assert report.warnings == ()


def test_a_model_without_a_chat_template_is_warned_of(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("official", tmp_path / "source"), "tokenizer_config.json", chat_template=None)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    for to in ("hf", "gguf"):
        report = llava_convert.convert(source, to=to, out=tmp_path / to, visual_encoder=models.tower)
        assert any("prompt_template" in text or "--prompt-template" in text for text in report.warnings)
    modelfile = next((tmp_path / "gguf").glob("*.Modelfile")).read_text()
    assert "the prompt is not known" in modelfile
