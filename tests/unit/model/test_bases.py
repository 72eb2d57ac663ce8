"""Base models: found in folders, beside the source, in the hub's cache; or the error says which option mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.model.bases import find_base
from llava_convert.storage.remote.origin import cached_id
from llava_convert.storage.remote.session import Session

LLM, VISION = "language_model", "vision_tower"
REVISION = "0" * 40


def cache(folder: Path, name: str, model: Path) -> Path:
    """A hub cache which holds `model` under an id, as huggingface_hub lays it out; returns the snapshot."""
    repo = folder / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    return repo / "snapshots" / REVISION


def edited(model: Path, out: Path, **change: Any) -> Path:
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    return out


def test_a_folder_that_the_user_names(tiny: Path) -> None:
    base = find_base(LLM, str(tiny / "llm"), Path("nowhere.pth"), Session(), explicit=True)
    assert (base.folder, base.from_hub, base.id) == (tiny / "llm", False, None)
    assert (base.config["model_type"], base.config["hidden_size"]) == ("llama", 64)
    assert sorted(base.tensors)[0] == "language_model.lm_head.weight"
    assert len(base.tensors) == 21 and base.dropped == ()


def test_a_relative_name_of_the_source_is_found_beside_it(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny / "llm", tmp_path / "models" / "llm")
    source = tmp_path / "work_dirs" / "run" / "iter_1.pth"
    base = find_base(LLM, "models/llm", source, Session(), explicit=False)
    assert base.folder == tmp_path / "models" / "llm"
    with pytest.raises(InputError, match="models/llm"):
        find_base(LLM, "models/llm", source, Session(), explicit=True)


@pytest.mark.parametrize(("part", "option"), [(LLM, "--llm"), (VISION, "--visual-encoder")])
def test_a_path_that_is_not_there(part: str, option: str) -> None:
    with pytest.raises(InputError, match="'/no/such/model' was not found") as caught:
        find_base(part, "/no/such/model", Path("x.pth"), Session(), explicit=False)
    assert caught.value.exit_code == 3
    assert caught.value.hint is not None and caught.value.hint.endswith(f"{option} PATH")


def test_an_id_that_no_cache_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match="the base language model 'org/absent' was not found: it is not a folder"
    ) as caught:
        find_base(LLM, "org/absent", Path("x.pth"), Session(), explicit=True)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "name its folder, or a hub id: --llm PATH"


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a model folder: it has no config\.json"):
        find_base(LLM, str(tmp_path), Path("x.pth"), Session(), explicit=True)


def test_an_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    snapshot = cache(tmp_path, "org/tiny-llm", tiny / "llm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = find_base(LLM, "org/tiny-llm", Path("x.pth"), Session(), explicit=True)
    assert (base.folder, base.id) == (snapshot, "org/tiny-llm")
    assert len(base.tensors) == 21
    by_path = find_base(LLM, str(snapshot), Path("x.pth"), Session(), explicit=True)
    assert (by_path.from_hub, by_path.id) == (False, "org/tiny-llm")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--org--name/snapshots/abc", "org/name"),
        ("models--org--na--me/snapshots/abc", "org/na--me"),
        ("models--gpt2/snapshots/abc", None),
        ("org/name", None),
        ("hub/models--a--b/snapshots/abc/vision", "a/b"),
    ],
)
def test_cached_id(folder: str, name: str | None) -> None:
    assert cached_id(Path("/cache") / folder) == name


@pytest.mark.slow
def test_converted_with_a_cache_alone(tmp_path: Path, tiny: Path) -> None:
    """Offline, by id, in a process of its own: HF_HOME is read when the client is imported."""
    cache(tmp_path / "home" / "hub", "org/tiny-vit", tiny / "vit")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", "from llava_convert.cli import main; main()", "pth", str(tiny / "iter_2.pth")]
    command += ["--to", "hf", "-o", "out", "--visual-encoder", "org/tiny-vit"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["_name_or_path"] == "org/tiny-vit"
    assert "vision tower is unknown" not in done.stderr and "language model is unknown" in done.stderr
    assert "base_model:\n- org/tiny-vit\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_base_stops_before_anything_is_written(tmp_path: Path, tiny: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="xtuner", out=tmp_path / "source")
    with pytest.raises(InputError, match="base vision tower 'vit' was not found") as caught:
        llava_convert.convert(tmp_path / "source", to="hf", out=tmp_path / "out")
    assert (caught.value.exit_code, caught.value.hint) == (3, "name its folder, or a hub id: visual_encoder=PATH")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# --- what a base may be


def test_the_vision_half_of_a_clip_model(tmp_path: Path, tiny: Path) -> None:
    """openai's repositories hold a whole CLIPModel: the text half is left behind, and said so."""
    vit = tiny / "vit"
    config = json.loads((vit / "config.json").read_text())
    inner = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    folder = tmp_path / "clip"
    folder.mkdir()
    whole = {"model_type": "clip", "_name_or_path": "openai/tiny", "vision_config": inner, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = load_file(vit / "model.safetensors")
    extra = {name: weights["vision_model.post_layernorm.bias"] for name in ("text_model.norm.bias", "logit_scale")}
    save_file(weights | extra, folder / "model.safetensors")
    base = find_base(VISION, str(folder), Path("x"), Session(), explicit=True)
    assert (base.config["model_type"], base.config["hidden_size"]) == ("clip_vision_model", 32)
    assert base.config["_name_or_path"] == "openai/tiny"
    assert len(base.tensors) == 55
    assert sorted(d.name for d in base.dropped) == ["logit_scale", "text_model.norm.bias"]


def test_a_tower_saved_by_transformers_5(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny / "vit", tmp_path / "vit")
    weights = load_file(tiny / "vit" / "model.safetensors")
    flat = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    save_file(flat, tmp_path / "vit" / "model.safetensors")
    base = find_base(VISION, str(tmp_path / "vit"), Path("x"), Session(), explicit=True)
    assert {n.removeprefix("vision_tower.") for n in base.tensors} == set(weights)


def test_a_quantised_base_is_refused(tmp_path: Path, tiny: Path) -> None:
    folder = edited(tiny / "llm", tmp_path / "llm", quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedError, match=r"stored quantised \(AWQ\)") as caught:
        _ = find_base(LLM, str(folder), Path("x"), Session(), explicit=True).config
    assert caught.value.hint is not None and "--llm" in caught.value.hint


def test_a_null_quantization_config_is_none(tmp_path: Path, tiny: Path) -> None:
    folder = edited(tiny / "llm", tmp_path / "llm", quantization_config=None)
    assert find_base(LLM, str(folder), Path("x"), Session(), explicit=True).config["hidden_size"] == 64


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="expected a JSON object"):
        _ = find_base(LLM, str(tmp_path), Path("x"), Session(), explicit=True).config


def test_a_tensor_that_is_there_twice(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny / "vit", tmp_path / "vit")
    weights = load_file(tiny / "vit" / "model.safetensors")
    again = {"post_layernorm.bias": weights["vision_model.post_layernorm.bias"]}
    save_file(weights | again, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(InputError, match=r"two tensors stand for vision_tower\.vision_model\.post_layernorm\.bias"):
        _ = find_base(VISION, str(tmp_path / "vit"), Path("x"), Session(), explicit=True).tensors


def test_a_base_with_unknown_tensors(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").unlink()
    save_file(load_file(tiny / "vit" / "model.safetensors"), tmp_path / "llm" / "model.safetensors")
    with pytest.raises(UnsupportedError, match="55 tensors that nothing takes: llm/vision_model"):
        _ = find_base(LLM, str(tmp_path / "llm"), Path("x"), Session(), explicit=True).tensors


def test_a_base_of_another_size_does_not_fit(tmp_path: Path, tiny: Path) -> None:
    """The projector joins two sizes: another language model is not taken in silence."""
    folder = edited(tiny / "vit", tmp_path / "vit", hidden_size=48)
    with pytest.raises(InputError, match="disagree"):
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", visual_encoder=str(folder))
    assert not (tmp_path / "o").exists()


def test_both_bases_that_are_missing_are_named_at_once(tiny: Path, tmp_path: Path) -> None:
    """One was named, and the other only once the first was given."""
    shutil.copy(tiny / "iter_2.pth", tmp_path)
    with pytest.raises(
        InputError, match=r"base language model 'tiny/llm' was not .* base vision tower 'tiny/vit' was"
    ) as e:
        llava_convert.convert(tmp_path / "iter_2.pth", to="hf", out=tmp_path / "o")
    assert str(e.value.hint).endswith(": llm=PATH visual_encoder=PATH")
    found = llava_convert.inspect(tmp_path / "iter_2.pth")
    assert found.next.endswith("iter_2.pth --to hf --llm PATH --visual-encoder PATH")
