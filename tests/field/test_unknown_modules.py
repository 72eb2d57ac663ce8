"""Modules that no table has, forks that only renamed, tables of the user's own, and rows against tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from tests.field.conftest import Models, edit

MORE = "projector_text2vision.model.0.weight"


def with_more(models: Models, folder: Path, name: str = MORE) -> Path:
    """The transformers folder with a module beside its parts."""
    models.copy("hf", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["llm", "projector", "visual-encoder"])
def test_parts_stand_alone(models: Models, tmp_path: Path, part: str) -> None:
    source = with_more(models, tmp_path / "source")
    report = llava_convert.convert(source, to="xtuner", part=part, out=tmp_path / "out")
    llava_convert.convert(models["hf"], to="xtuner", part=part, out=tmp_path / "same")
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.safetensors")]
    assert files
    for file in files:
        one, other = (load_file(tmp_path / side / file) for side in ("out", "same"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert [(drop.name, "one part" in drop.reason) for drop in report.dropped if drop.name == MORE] == [(MORE, True)]


def test_the_whole_is_refused_by_name_and_dropped_when_asked(models: Models, tmp_path: Path) -> None:
    source = with_more(models, tmp_path / "source")
    with pytest.raises(UnsupportedError, match=MORE.replace(".", r"\.")) as found:
        llava_convert.convert(source, to="official", out=tmp_path / "out")
    assert "extra" in str(found.value.hint) and "drop" in str(found.value.hint)
    report = llava_convert.convert(source, to="official", out=tmp_path / "out", extra="drop")
    assert [drop.name for drop in report.dropped] == [MORE]
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert [drop["name"] for drop in record["dropped"]] == [MORE]
    assert llava_convert.verify(source, tmp_path / "out", extra="drop")
    with pytest.raises(UnsupportedError, match="nothing takes"):
        llava_convert.verify(source, tmp_path / "out")


def test_more_in_the_output_is_a_difference(models: Models, tmp_path: Path) -> None:
    llava_convert.convert(models["official"], to="hf", out=tmp_path / "out", visual_encoder=models.tower)
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file(tensors | {MORE: torch.ones(2, 2)}, tmp_path / "out/model.safetensors", {"format": "pt"})
    verdict = llava_convert.verify(models["official"], tmp_path / "out", visual_encoder=models.tower)
    assert not verdict and verdict.extra == (MORE,)


def test_options_without_use(models: Models, tmp_path: Path) -> None:
    for option in ({"extra": "drop"}, {"vocab": "rows"}, {"vocab": "tokens"}):
        with pytest.raises(UsageError, match="does not apply"):
            llava_convert.convert(models["hf"], to="official", out=tmp_path / "out", **option)


# --- tables


def table(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_table_gives_names_a_meaning(models: Models, tmp_path: Path) -> None:
    """A fork that calls the projector otherwise: with its rows the model is the same."""
    source = models.copy("hf", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    renamed = {k.replace("multi_modal_projector.linear_", "bridge.fc"): v for k, v in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="4 tensors that nothing takes"):
        llava_convert.convert(source, to="official", out=tmp_path / "out")
    mine = table(
        tmp_path,
        'layout = "hf"\n'
        "row = [\n"
        '  { dialect = "mine", disk = "bridge.fc1.{param}", canonical = "projector.0.{param}" },\n'
        '  { dialect = "mine", disk = "bridge.fc2.{param}", canonical = "projector.2.{param}" },\n'
        "]\n",
    )
    llava_convert.convert(source, to="official", out=tmp_path / "out", table=mine)
    assert llava_convert.verify(models["hf"], tmp_path / "out")
    # What one job was given is gone for the next.
    with pytest.raises(UnsupportedError, match="nothing takes"):
        llava_convert.convert(source, to="official", out=tmp_path / "other")


def test_a_table_names_a_fork(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("official", tmp_path / "source"), model_type="myllava", architectures=["MyForCausalLM"])
    with pytest.raises(UnsupportedError, match="'myllava'") as found:
        llava_convert.convert(source, to="xtuner", out=tmp_path / "out")
    assert 'forks = ["myllava"]' in str(found.value.hint)
    mine = table(tmp_path, 'architecture = "llama"\nforks = ["myllava"]\n')
    llava_convert.convert(source, to="xtuner", out=tmp_path / "out", table=mine)
    assert llava_convert.verify(models["official"], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("= 1", "not TOML"),
        ('name = "x"', "names one"),
        ('layout = "hf"', "neither a `row` nor a `drop`"),
        ('layout = "hf"\nrow = [{ disk = "a" }]', "each `row`"),
        ('layout = "hf"\nrow = [{ disk = "a.{x}", canonical = "projector.0.{y}" }]', "different placeholders"),
        (
            'layout = "hf"\nrow = [{ disk = "multi_modal_projector.{x...}", canonical = "projector.{x...}" }]',
            "can match the same name",
        ),
        ('architecture = "llama"', "neither `tensor` nor `forks`"),
        ('architecture = "lama"\nforks = ["x"]', "no family is called lama"),
        (
            'architecture = "llama"\npart = "language_model"\nmodel_types = ["x"]\ntensor = []',
            "there is a family llama",
        ),
        (
            'architecture = "x"\npart = "language_model"\nmodel_types = ["x"]\ntensor = [{ name = "a" }]',
            "each `tensor`",
        ),
        (
            'architecture = "x"\npart = "language_model"\nmodel_types = ["x"]\ntensor = [{ name = "a", shape = [1] }]',
            "no tensor is the embedding",
        ),
    ],
)
def test_a_table_is_checked_like_ours(models: Models, tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem.replace("(", r"\(")) as found:
        llava_convert.convert(models["hf"], to="official", out=tmp_path / "out", table=table(tmp_path, text))
    assert "mine.toml" in found.value.message


def test_a_table_of_another_layout(models: Models, tmp_path: Path) -> None:
    mine = table(tmp_path, 'layout = "pth"\nrow = [{ disk = "x.{p}", canonical = "projector.9.{p}" }]')
    with pytest.raises(UsageError, match=r"mine\.toml does not apply"):
        llava_convert.convert(models["hf"], to="official", out=tmp_path / "out", table=mine)


# --- forks


@pytest.mark.parametrize(
    ("kind", "classes", "more"),
    [
        ("share4v", "Share4VLlamaForCausalLM", {"tune_vit_layer": 12, "tune_entire_model": True}),
        ("bunny-llama", "BunnyLlamaForCausalLM", {"unfreeze_vision_tower": True, "use_s2": False}),
    ],
)
def test_forks_that_only_renamed(models: Models, tmp_path: Path, kind: str, classes: str, more: dict[str, Any]) -> None:
    source = edit(models.copy("official", tmp_path / "source"), model_type=kind, architectures=[classes], **more)
    edit(source, unfreeze_mm_vision_tower=None)
    report = llava_convert.convert(source, to="hf", out=tmp_path / "out", visual_encoder=models.tower)
    wanted = llava_convert.convert(models["official"], to="hf", out=tmp_path / "same", visual_encoder=models.tower)
    one, other = (load_file(tmp_path / side / "model.safetensors") for side in ("out", "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not [text for text in report.warnings if text not in wanted.warnings]


def test_bunny_at_several_scales_is_refused_by_name(models: Models, tmp_path: Path) -> None:
    source = edit(
        models.copy("official", tmp_path / "source"), model_type="bunny-llama", architectures=None, use_s2=True
    )
    with pytest.raises(UnsupportedError, match="use_s2"):
        llava_convert.convert(source, to="hf", out=tmp_path / "out", visual_encoder=models.tower)


def test_tinyllava(models: Models, tmp_path: Path) -> None:
    """Its names and its config; the class token is left out by both, as `patch` says."""
    source = models.copy("hf", tmp_path / "source")
    (source / "conversion.json").unlink()
    tensors = load_file(source / "model.safetensors")
    names = {
        "vision_tower.": "vision_tower._vision_tower.",
        "multi_modal_projector.linear_1.": "connector._connector.0.",
        "multi_modal_projector.linear_2.": "connector._connector.2.",
    }
    renamed = {}
    for key, value in tensors.items():
        old = next((old for old in names if key.startswith(old)), "")
        renamed[names.get(old, "") + key.removeprefix(old)] = value
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    edit(
        source, model_type="tinyllava", connector_type="mlp2x_gelu",
        architectures=["TinyLlavaForConditionalGeneration"],
        vision_feature_select_strategy="patch", llm_model_name_or_path="org/llm", image_aspect_ratio="pad",
        image_token_index=-200, projector_hidden_act=None, image_seq_length=None,
    )  # fmt: skip
    llava_convert.convert(source, to="hf", out=tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == tensors.keys() and all(torch.equal(made[k], tensors[k]) for k in made)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llava" and config["vision_feature_select_strategy"] == "default"
    edit(source, vision_feature_select_strategy="cls_patch")
    llava_convert.convert(source, to="hf", out=tmp_path / "full")
    assert json.loads((tmp_path / "full/config.json").read_text())["vision_feature_select_strategy"] == "full"


# --- rows and tokens


def grown(models: Models, folder: Path, rows: int) -> Path:
    """An official folder whose vocabulary has more (or fewer) rows than its config and its tokenizer know."""
    models.copy("official", folder)
    (folder / "conversion.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.full((max(rows, 0), tensors[name].shape[1]), 0.5, dtype=tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], more])[: tensors[name].shape[0] + rows].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def size(models: Models) -> int:
    return int(json.loads((models["official"] / "config.json").read_text())["vocab_size"])


def test_rows_that_were_added_in_training_code(models: Models, tmp_path: Path) -> None:
    source, known = grown(models, tmp_path / "source", 3), size(models)
    given: dict[str, Any] = {"visual_encoder": models.tower}
    with pytest.raises(InputError, match=f"has {known + 3} rows, but the config has vocab_size {known}") as found:
        llava_convert.convert(source, to="xtuner", out=tmp_path / "out", **given)
    assert "rows" in str(found.value.hint) and "tokens" in str(found.value.hint) and "llm" in str(found.value.hint)
    held = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    for word, rows in (("rows", known + 3), ("tokens", known)):
        llava_convert.convert(source, to="xtuner", out=tmp_path / word, vocab=word, **given)
        made = load_file(tmp_path / word / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(made, held[:rows])
        assert json.loads((tmp_path / word / "config.json").read_text())["vocab_size"] == rows
        assert llava_convert.verify(source, tmp_path / word, vocab=word, **given)


def test_a_base_that_knows_them_is_the_other_way(models: Models, tmp_path: Path, tiny: Path) -> None:
    source, known = grown(models, tmp_path / "source", 3), size(models)
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    edit(bare, vocab_size=known + 3)
    llava_convert.convert(bare, to="xtuner", out=tmp_path / "out", visual_encoder=models.tower)
    made = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"]
    assert made.shape[0] == known + 3


def test_a_token_without_a_row(models: Models, tmp_path: Path) -> None:
    """The tokenizer has two tokens more than the embedding has rows: they get the mean of the others."""
    source, known = models.copy("official", tmp_path / "source"), size(models)
    (source / "conversion.json").unlink()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": known + i, "content": f"<new{i}>", **flags} for i in (0, 1)]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    given: dict[str, Any] = {"visual_encoder": models.tower}
    for to in ("hf", "gguf", "xtuner"):
        with pytest.raises(InputError, match=f"{known + 2} tokens, but the embedding only {known} rows") as found:
            llava_convert.convert(source, to=to, out=tmp_path / to, **given)
        assert "tokens" in str(found.value.hint) and "vocab" in str(found.value.hint)
    llava_convert.convert(source, to="xtuner", out=tmp_path / "out", vocab="tokens", **given)
    held = load_file(source / "model.safetensors")
    made = load_file(tmp_path / "out/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = held[name].double().mean(0)
        assert torch.equal(made[name][:known], held[name])
        assert made[name].shape[0] == known + 2
        assert torch.allclose(made[name][known:].double(), mean.expand(2, -1), atol=2**-11)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == known + 2
    for to in ("hf", "gguf"):
        llava_convert.convert(source, to=to, out=tmp_path / to, vocab="tokens", **given)
