"""What the bounds of `verify --logits` rest on: a LLaVA around a language model that people use, rounded and quantised.

The language model is SmolLM2-135M, trained, of 30 layers; the tower has 24 random ones, since no package holds a
trained one. Each form must lie well within its bound, and a tenth of the bound must be too little for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llava_convert
from llava_convert.app.logits.compare import BOUNDS
from llava_convert.core.resources import training
from tests.interop.peer_programs import PEERS

pytestmark = pytest.mark.peers
DTYPES = {"f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as hf in float32."""
    published = next(PEERS.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"), None)
    if published is None:
        pytest.skip("no SmolLM2: `make peers` fetches it")
    at = tmp_path_factory.mktemp("smol")
    llava_convert.convert(published, to="hf", out=at / "llm", dtype="float32", dequantize=True)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4}
    training("tiny").write_tower(at / "vit", seed=4, image_size=112, patch_size=14, **sizes)
    chance = torch.Generator().manual_seed(3)
    projector = {"0": (576, 256), "2": (576, 576)}
    state = {
        f"projector.model.{n}.weight": torch.randn(shape, generator=chance) / shape[1] ** 0.5
        for n, shape in projector.items()
    }
    state |= {f"projector.model.{n}.bias": torch.zeros(shape[0]) for n, shape in projector.items()}
    torch.save({"state_dict": state, "meta": {}}, at / "iter_1.pth")
    bases = {"llm": str(at / "llm"), "visual_encoder": str(at / "vit")}
    llava_convert.convert(at / "iter_1.pth", to="hf", out=at / "hf", dtype="float32", **bases)
    return at / "hf"


@pytest.fixture(scope="module")
def gguf(exact: Path) -> Path:
    llava_convert.convert(exact, to="gguf", out=exact.parent / "gguf", name="m", outtype=",".join(DTYPES))
    return exact.parent / "gguf"


@pytest.mark.parametrize("outtype", DTYPES)
def test_a_gguf(exact: Path, gguf: Path, outtype: str) -> None:
    """All sites, as this package computes the file: of 16 bits and of blocks."""
    verdict = llava_convert.verify(exact, gguf / f"m-{outtype}.gguf", logits=True, device="cpu")
    found, dtype = verdict.logits, DTYPES[outtype]
    assert found is not None and verdict.same and (found.dtype, found.bound) == (dtype, BOUNDS[dtype])
    worst = max(site.relative for site in found.sites)
    assert found.bound / 10 < worst < found.bound / 3, worst


@pytest.mark.parametrize("outtype", DTYPES)
def test_a_gguf_in_llama_cpp(exact: Path, gguf: Path, outtype: str) -> None:
    """The text, which it computes as the model was trained."""
    pytest.importorskip("xllamacpp")
    out = gguf / f"m-{outtype}.gguf"
    found = llava_convert.verify(exact, out, logits=True, device="cpu", runtime="llama.cpp").logits
    assert found is not None and found.bound == BOUNDS[DTYPES[outtype]]
    (text,) = [site.relative for site in found.sites if site.name == "logits of text"]
    assert found.bound / 10 < text < found.bound / 3, text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder(exact: Path, tmp_path: Path, dtype: str) -> None:
    llava_convert.convert(exact, to="hf", out=tmp_path / "hf", dtype=dtype)
    found = llava_convert.verify(exact, tmp_path / "hf", logits=True, device="cpu").logits
    assert found is not None and found.same and (found.dtype, found.bound) == (dtype, BOUNDS[dtype])
    assert found.bound / 10 < max(site.relative for site in found.sites) < found.bound / 3
