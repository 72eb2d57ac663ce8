"""Adapters that the real peft saved: merged here, they compute what peft computes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
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


@pytest.mark.peers
@pytest.mark.parametrize("name", OLD)
def test_names_of_old_releases(base: Path, tmp_path: Path, name: str) -> None:
    """peft 0.12 under transformers 4.43, with the classic names."""
    made = in_peer(
        "xtuner", "save_adapters.py", {"base": str(base), "out": str(tmp_path), "variants": [name]}, tmp_path
    )
    llava_convert.convert(tmp_path / name, to="hf", out=tmp_path / "out", dtype="float32")
    model = load_hf(tmp_path / "out")
    assert gap(logits(model, model.config), torch.tensor(made["logits"][name])) <= OTHER_RELEASE
