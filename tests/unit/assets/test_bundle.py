"""What stands beside the weights: ids of base models, settings that travel, templates, stop ids, processors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.app.options import Options
from llava_convert.app.planning import Prepared, prepare
from llava_convert.core.errors import UsageError
from llava_convert.model import towers
from llava_convert.model.checkpoint import VISION
from llava_convert.model.configs import named_config
from llava_convert.storage.remote.session import Session
from llava_convert.storage.torch.file import read_torch

GUESS = "the hub id of the {} is unknown"


def planned(source: Path, to: str, **options: Any) -> Prepared:
    return prepare(source, Options(to=to, **options), Session())


def config(ready: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ready.target.files["config.json"])
    return found


def training_config(tiny: Path, out: Path, *edits: tuple[str, str]) -> Path:
    """The training config of the tiny checkpoint, with lines changed."""
    root = read_torch(tiny / "iter_2.pth").root
    text = root["meta"]["cfg"]
    for pattern, line in edits:
        assert re.search(pattern, text, re.MULTILINE), pattern
        text = re.sub(pattern, line, text, flags=re.MULTILINE)
    out.write_text(text)
    return out


def edited(model: Path, out: Path, **change: Any) -> Path:
    shutil.copytree(model, out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return out


# --- ids, in the order of the design: option, cache, the base's own name, the shape, the folder's name


def test_ids_as_asked(tiny: Path, tmp_path: Path) -> None:
    llm = edited(tiny / "llm", tmp_path / "llm", _name_or_path="meta/other")
    bases = {"llm": str(llm), "llm_id": "meta/tiny", "visual_encoder_id": "openai/tiny"}
    ready = planned(tiny / "iter_2.pth", "hf", **bases)
    assert config(ready)["text_config"]["_name_or_path"] == "meta/tiny"
    assert config(ready)["vision_config"]["_name_or_path"] == "openai/tiny"
    assert not any("hub id" in warning for warning in ready.warnings)
    assert config(planned(tiny / "iter_2.pth", "official", **bases))["mm_vision_tower"] == "openai/tiny"


def test_id_of_the_cache_before_the_config(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--cached" / "snapshots" / "abc"
    edited(tiny / "vit", snapshot, _name_or_path="someone/else")
    ready = planned(tiny / "iter_2.pth", "hf", visual_encoder=str(snapshot))
    assert config(ready)["vision_config"]["_name_or_path"] == "org/cached"


def test_id_of_the_config(tiny: Path, tmp_path: Path) -> None:
    llm = edited(tiny / "llm", tmp_path / "here", _name_or_path="meta/tiny")
    ready = planned(tiny / "iter_2.pth", "official", llm=str(llm))
    assert config(ready)["_name_or_path"] == "meta/tiny"
    assert not any(GUESS.format("language model") in warning for warning in ready.warnings)


@pytest.fixture
def known_tower(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    raw = json.loads((tiny / "vit" / "config.json").read_text())
    sizes = {k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype", "transformers_version")}
    monkeypatch.setattr(towers, "towers", lambda: {"org/by-shape": named_config(sizes, VISION, where="test")})
    return "org/by-shape"


def test_id_of_the_shape_before_the_folder(tiny: Path, known_tower: str) -> None:
    ready = planned(tiny / "iter_2.pth", "official")
    assert config(ready)["mm_vision_tower"] == known_tower
    assert not any(GUESS.format("vision tower") in warning for warning in ready.warnings)


def test_id_of_the_config_before_the_shape(tiny: Path, tmp_path: Path, known_tower: str) -> None:
    vit = edited(tiny / "vit", tmp_path / "vit", _name_or_path="org/by-name")
    ready = planned(tiny / "iter_2.pth", "official", visual_encoder=str(vit))
    assert config(ready)["mm_vision_tower"] == "org/by-name" != known_tower


def test_the_folder_with_a_note(tiny: Path, tmp_path: Path) -> None:
    vit = edited(tiny / "vit", tmp_path / "my-vit", _name_or_path="/home/someone/secret/clip")
    ready = planned(tiny / "iter_2.pth", "official", visual_encoder=str(vit))
    assert config(ready)["mm_vision_tower"] == "my-vit"
    (note,) = [text for text in ready.notes if GUESS.format("vision tower") in text]
    assert "the config names its folder, 'my-vit': set the id with --visual-encoder-id" in note
    written = b"".join(ready.target.files.values())
    assert b"secret" not in written and str(tmp_path).encode() not in written


# --- settings


def test_the_feature_layer_travels(tiny: Path, tmp_path: Path) -> None:
    """visual_select_layer of another training config reaches both targets, and comes back from each."""
    cfg = training_config(tiny, tmp_path / "cfg.py", (r"^model = dict\(", "model = dict(visual_select_layer=-1,"))
    plain = planned(tiny / "iter_2.pth", "hf")
    assert config(plain)["vision_feature_layer"] == -2
    hf, official = (planned(tiny / "iter_2.pth", to, config=cfg) for to in ("hf", "official"))
    assert config(hf)["vision_feature_layer"] == -1
    assert config(official)["mm_vision_select_layer"] == -1
    for to, other, key in (("hf", "official", "mm_vision_select_layer"), ("official", "hf", "vision_feature_layer")):
        llava_convert.convert(tiny / "iter_2.pth", to=to, out=tmp_path / to, config=cfg)
        assert config(planned(tmp_path / to, other))[key] == -1


def test_a_difference_of_the_feature_layer_is_no_equality(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "official"
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=out)
    assert llava_convert.verify(tiny / "iter_2.pth", out).same
    found = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(found | {"mm_vision_select_layer": -1}))
    verdict = llava_convert.verify(tiny / "iter_2.pth", out)
    assert not verdict.same
    assert {name: (d.source, d.out) for name, d in verdict.facts.items()} == {"vision.feature_layer": (2, 3)}


@pytest.mark.parametrize(
    ("to", "key"), [("hf", "vision_feature_select_strategy"), ("official", "mm_vision_select_feature")]
)
def test_the_class_token_travels(tiny: Path, tmp_path: Path, to: str, key: str) -> None:
    source = "official" if to == "hf" else "hf"
    llava_convert.convert(tiny / "iter_2.pth", to=source, out=tmp_path / source)
    file = tmp_path / source / "config.json"
    theirs = {"official": ("mm_vision_select_feature", "cls_patch"), "hf": ("vision_feature_select_strategy", "full")}
    name, value = theirs[source]
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    ready = planned(tmp_path / source, to)
    assert config(ready)[key] == {"hf": "full", "official": "cls_patch"}[to]
    if to == "hf":
        processor = json.loads(ready.target.files["processor_config.json"])
        assert processor["vision_feature_select_strategy"] == "full"


def test_official_flags(tiny: Path) -> None:
    """Without the first, LLaVA replaces a trained tower by the published one; without the others it adds tokens."""
    found = config(planned(tiny / "iter_2.pth", "official"))
    assert found["unfreeze_mm_vision_tower"] is True
    assert (found["mm_use_im_patch_token"], found["mm_use_im_start_end"]) == (False, False)
    assert (found["model_type"], found["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert (found["mm_projector_type"], found["mm_hidden_size"]) == ("mlp2x_gelu", 32)
    assert (found["image_aspect_ratio"], found["mm_vision_select_feature"]) == ("pad", "patch")


def test_hf_config(tiny: Path) -> None:
    found = config(planned(tiny / "iter_2.pth", "hf"))
    assert (found["image_token_index"], found["pad_token_id"], found["vocab_size"]) == (513, 514, 576)
    assert (found["image_seq_length"], found["text_config"]["vocab_size"]) == (16, 576)
    assert found["text_config"]["rope_theta"] == 500000.0
    assert "rope_parameters" not in found["text_config"] and "dtype" not in found
    assert found["vision_config"]["architectures"] == ["CLIPVisionModel"]


def test_image_processor(tiny: Path) -> None:
    clip = planned(tiny / "iter_2.pth", "hf").target.files
    llava = planned(tiny / "iter_2.pth", "hf", image_processor="llava").target.files
    assert json.loads(clip["preprocessor_config.json"])["image_processor_type"] == "CLIPImageProcessor"
    padded = json.loads(llava["preprocessor_config.json"])
    assert (padded["image_processor_type"], padded["do_pad"]) == ("LlavaImageProcessor", True)
    assert {n for n in clip if clip[n] != llava[n]} == {"preprocessor_config.json"}


@pytest.mark.parametrize("to", ["hf", "official"])
def test_prompt_template_asked_for(tiny: Path, to: str) -> None:
    trained = planned(tiny / "iter_2.pth", to).target.files
    vicuna = planned(tiny / "iter_2.pth", to, prompt_template="vicuna").target.files
    for files, there, not_there in (
        (trained, "<|start_header_id|>", "USER:"),
        (vicuna, "USER:", "<|start_header_id|>"),
    ):
        template = json.loads(files["tokenizer_config.json"])["chat_template"]
        assert there in template and not_there not in template
        if to == "hf":
            assert files["chat_template.jinja"].decode() == template
    with pytest.raises(UsageError, match="nonsense"):
        planned(tiny / "iter_2.pth", to, prompt_template="nonsense")


def test_prompt_template_of_the_training_config(tiny: Path, tmp_path: Path) -> None:
    edit = (r"PROMPT_TEMPLATE\.llama3_chat", "PROMPT_TEMPLATE.vicuna")
    cfg = training_config(tiny, tmp_path / "cfg.py", edit)
    template = json.loads(planned(tiny / "iter_2.pth", "hf", config=cfg).target.files["tokenizer_config.json"])
    assert "USER:" in template["chat_template"]


@pytest.mark.parametrize("to", ["hf", "official", "xtuner"])
def test_generation_config_has_every_stop(tiny: Path, to: str) -> None:
    """The base's own two, once each; its sampling settings stay."""
    found = json.loads(planned(tiny / "iter_2.pth", to).target.files["generation_config.json"])
    assert sorted(found["eos_token_id"]) == [449, 457]
    assert (found["bos_token_id"], found["do_sample"], found["temperature"]) == (448, True, 0.6)
    assert "transformers_version" not in found


def test_stop_of_the_template_is_added(tiny: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(tiny / "llm", llm)
    (llm / "generation_config.json").write_text('{"bos_token_id": 448, "eos_token_id": 449}')
    found = json.loads(planned(tiny / "iter_2.pth", "hf", llm=str(llm)).target.files["generation_config.json"])
    assert sorted(found["eos_token_id"]) == [449, 457], "<|eot_id|> ends llama3_chat's turns"
