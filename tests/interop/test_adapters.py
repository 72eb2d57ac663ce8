"""Adapters that the real peft saved: merged here, they compute what peft computes with them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_convert
from tests.interop.conftest import gap
from tests.interop.peer_programs import in_peer
from tests.interop.test_transformers import load_hf
from tests.peers import save_adapters
from tests.peers.save_adapters import VARIANTS, logits

TOLERANCE = 2e-5
OTHER_RELEASE = 1e-4  # whose attention sums in another order
OLD = [name for name in VARIANTS if name != "tokens"]


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers LLaVA of ours, in float32, so that nothing is rounded."""
    out = tmp_path_factory.mktemp("base") / "llava"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, dtype="float32", prompt_template="llama3_chat")
    return out


def by_peft(base: Path, *adapters: Path) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = model.config
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return logits(PeftModel.from_pretrained(model, adapters[-1]).eval(), config)


def gap_to_peft(out: Path, base: Path, *adapters: Path) -> float:
    model = load_hf(out)
    return gap(logits(model, model.config), by_peft(base, *adapters))


@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_what_peft_computes(base: Path, tmp_path: Path, name: str) -> None:
    save_adapters.save(base, tmp_path, name)
    llava_convert.convert(tmp_path / name, to="hf", out=tmp_path / "out", dtype="float32", verify="full")
    assert gap_to_peft(tmp_path / "out", base, tmp_path / name) <= TOLERANCE
    model = load_hf(base)
    assert gap(logits(model, model.config), by_peft(base, tmp_path / name)) > 100 * TOLERANCE
    assert llava_convert.verify(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["embedding", "saved_embedding", "tokens"])
def test_a_tied_head(base: Path, tmp_path: Path, name: str) -> None:
    """peft gives single tokens to the head, too; of an embedding trained otherwise the head keeps the frozen one."""
    tied = shutil.copytree(base, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    weights = load_file(tied / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    (tied / "model.safetensors").unlink()
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    right = save_adapters.save(tied, tmp_path, name)
    report = llava_convert.convert(tmp_path / name, to="hf", out=tmp_path / "out", dtype="float32")
    model = load_hf(tmp_path / "out")
    assert gap(logits(model, model.config), right) <= TOLERANCE
    assert model.config.text_config.tie_word_embeddings == (name == "tokens")
    assert any("both are kept, untied" in told for told in report.warnings) == (name != "tokens")


def test_several_in_a_row(base: Path, tmp_path: Path) -> None:
    adapters = [tmp_path / name for name in ("plain", "all_linear")]
    for adapter in adapters:
        save_adapters.save(base, tmp_path, adapter.name)
    llava_convert.merge(base, adapter=adapters, out=tmp_path / "out", dtype="float32")
    assert gap_to_peft(tmp_path / "out", base, *adapters) <= TOLERANCE
    one_more = llava_convert.merge(base, adapter=adapters[:1], out=tmp_path / "one", dtype="float32")
    assert one_more.layouts == ("hf", "hf")
    assert not llava_convert.verify(tmp_path / "one", tmp_path / "out")


def test_through_official_and_xtuner(base: Path, tmp_path: Path) -> None:
    save_adapters.save(base, tmp_path, "all_linear")
    for to in ("official", "xtuner"):
        llava_convert.convert(tmp_path / "all_linear", to=to, out=tmp_path / to, dtype="float32")
        llava_convert.convert(tmp_path / to, to="hf", out=tmp_path / f"{to}_hf", dtype="float32")
        assert gap_to_peft(tmp_path / f"{to}_hf", base, tmp_path / "all_linear") <= TOLERANCE


def classic(folder: Path) -> None:
    """Give the tensors of an adapter the names of transformers 4.51 and before."""
    file = folder / "adapter_model.safetensors"
    renamed = {}
    for name, value in load_file(file).items():
        name = name.removeprefix("base_model.model.").removeprefix("model.")
        name = f"language_model.{name}" if name.startswith("lm_head") else name
        name = name.replace("language_model.layers", "language_model.model.layers")
        name = name.replace("language_model.embed", "language_model.model.embed")
        renamed["base_model.model." + name.replace("vision_tower.", "vision_tower.vision_model.")] = value
    file.unlink()
    save_file(renamed, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["all_linear", "saved_modules", "dora", "patterns", "rslora", "embedding", "tokens"])
def test_old_names_become_todays(base: Path, tmp_path: Path, name: str) -> None:
    """peft puts on nothing with the old ones, and everything with those that are written."""
    right = save_adapters.save(base, tmp_path, name)
    classic(tmp_path / name)
    llava_convert.convert(tmp_path / name, to="peft", out=tmp_path / "out", verify="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # which peft gives for missing keys
        assert gap(by_peft(base, tmp_path / "out"), right) <= TOLERANCE
    assert llava_convert.verify(tmp_path / name, tmp_path / "out")
    if name == "all_linear":
        assert gap(by_peft(base, tmp_path / name), right) > 100 * TOLERANCE


def test_adapters_of_xtuner_become_one(golden: Path, tmp_path: Path) -> None:
    """Those of language model and tower and the projector, over a LLaVA of the base models and another projector."""
    case = golden / "cases" / "b_llmlora_vitlora" / "pth" / "iter_2.pth"
    merged, out, bridge, base = (tmp_path / name for name in ("merged", "out", "bridge", "base"))
    llava_convert.convert(case, to="hf", out=merged, dtype="float32")
    llava_convert.convert(case, to="peft", out=out)
    llava_convert.convert(case, to="official", part="projector", out=bridge, dtype="float32")
    found = torch.load(bridge / "mm_projector.bin")
    torch.save({name: torch.zeros_like(value) for name, value in found.items()}, bridge / "mm_projector.bin")
    parts = golden / "parts" / "plain"
    llava_convert.convert(
        bridge, to="hf", out=base, dtype="float32", llm=str(parts / "llm"), visual_encoder=str(parts / "vit")
    )
    model = load_hf(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert gap(by_peft(base, out), logits(model, model.config)) <= TOLERANCE
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert llava_convert.verify(case, out)


@pytest.mark.peers
@pytest.mark.parametrize("name", OLD)
def test_names_of_old_releases(base: Path, tmp_path: Path, name: str) -> None:
    """peft 0.12 under transformers 4.43, with the classic names."""
    made = in_peer(
        "xtuner", "save_adapters.py", {"base": str(base), "out": str(tmp_path), "variants": [name]}, tmp_path
    )
    report = llava_convert.convert(tmp_path / name, to="hf", out=tmp_path / "out", dtype="float32")
    if name == "bias_lora_only":  # which 0.12 trains and does not save
        assert any("the adapter holds no bias" in told for told in report.warnings)
        return
    model = load_hf(tmp_path / "out")
    assert gap(logits(model, model.config), torch.tensor(made["logits"][name])) <= OTHER_RELEASE
