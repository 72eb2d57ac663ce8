"""Facts in the programs that read our other layouts: the llava package, and llama.cpp's runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from tests.interop.conftest import PROMPT, Converter, gap
from tests.interop.fact_models import CASES, TOKENS, Models
from tests.interop.llama_cpp import LlamaCpp, llm_file, mmproj_file
from tests.interop.peer_programs import in_peer
from tests.interop.test_llama_cpp import MARKER, ROWS_F32, prompt

pytestmark = pytest.mark.peers

# transformers 4.37, on which llava 1.2.2 stands, computes no llama3 or yarn scaling.
OFFICIAL = (
    "layer-1", "layer-3", "last-layer", "layer-3-from-the-end", "every-feature", "rope-theta", "linear-rope",
    "activation-of-words", "norm", "norm-of-the-tower", "activation-of-the-tower",
)  # fmt: skip
WORDS = ("rope-theta", "linear-rope", "llama3-rope", "yarn-rope", "norm")
ROWS = ("layer-1", "layer-3", "last-layer", "layer-3-from-the-end", "norm-of-the-tower", "activation-of-the-tower")
TOLERANCE = 1e-5  # measured: at most 9.5e-7
LOGITS_F32 = 3e-5  # of llama.cpp on 300 tokens, as in test_gguf_families; measured: at most 2.2e-6


@dataclass(frozen=True)
class Seen:
    report: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def models(converted: Converter, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(converted, tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def seen(
    models: Models,
    pixels: torch.Tensor,
    wide_picture: Image.Image,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    """The llava package on our official outputs. It takes a tower's config from the tower that ours name."""
    folder = tmp_path_factory.mktemp("llava")
    np.save(folder / "pixels.npy", pixels.numpy())
    wide_picture.save(folder / "wide.png")
    job: dict[str, Any] = {"models": {}, "prompt": PROMPT, "pixels": str(folder / "pixels.npy"), "folder": str(folder)}
    job |= {"picture": str(tiny / "picture.png"), "wide": str(folder / "wide.png")}
    for name in OFFICIAL:
        source = models.source(name)
        write_tower(source, folder / "openai" / name)
        out = models.converted.onward(source, "official", dtype="float16", visual_encoder_id=f"openai/{name}")
        job["models"][name] = {"folder": str(out)}
    return Seen(in_peer("llava", "run_official.py", job, folder), folder)


def write_tower(source: Path, folder: Path) -> None:
    """The tower of an hf folder alone."""
    folder.mkdir(parents=True)
    weights = load_file(source / "model.safetensors")
    prefix = "vision_tower."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"], **config}))
    (folder / "preprocessor_config.json").write_bytes((source / "preprocessor_config.json").read_bytes())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """In float32, after a rounding to `dtype`."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@pytest.mark.parametrize("name", OFFICIAL)
@torch.inference_mode()
def test_in_the_llava_package(seen: Seen, models: Models, pixels: torch.Tensor, name: str) -> None:
    assert seen.report[name]["keys"] == []
    model = load(models.source(name), torch.float16)
    ids = seen.report[name]["ids"]
    at, count = ids.index(-200), CASES[name].features
    expanded = torch.tensor([[*ids[:at], *[model.config.image_token_index] * count, *ids[at + 1 :]]])
    wanted = model(input_ids=expanded, pixel_values=pixels).logits[0, :, :TOKENS]
    found = torch.from_numpy(np.load(seen.folder / f"{name}.npy"))[:, :TOKENS]
    assert gap(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", WORDS)
@torch.inference_mode()
def test_words_in_llama_cpp(models: Models, llama_cpp: LlamaCpp, name: str) -> None:
    ids = torch.randint(256, 440, (299,), generator=torch.Generator().manual_seed(3)).tolist()
    task = {"kind": "logits", "model": llm_file(models.out(name, "gguf"), "f32"), "ids": [448, *ids]}
    found = torch.from_numpy(llama_cpp.ask(words=task)["words"]["array"])[:, :TOKENS]
    wanted = load(models.source(name))(input_ids=torch.tensor([[448, *ids]])).logits[0, :, :TOKENS]
    assert gap(found, wanted) <= LOGITS_F32


@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_a_picture_in_llama_cpp(models: Models, llama_cpp: LlamaCpp, tiny: Path, tmp_path: Path, name: str) -> None:
    """The rows that the projector makes, in the runtime without its defect (it puts the class token last)."""
    picture = Image.open(tiny / "picture.png").convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    np.save(tmp_path / "picture.npy", np.asarray(picture))
    out = models.out(name, "gguf")
    task = {
        "kind": "picture", "model": llm_file(out, "f32"), "mmproj": mmproj_file(out, "f32"), "count": 1,
        "picture": tmp_path / "picture.npy", "prompt": prompt(MARKER),
    }  # fmt: skip
    found = torch.from_numpy(llama_cpp.ask("repaired", seen=task)["seen"]["array"])
    source, usual = load(models.source(name)), load(models.usual(name))
    seen = CLIPImageProcessor.from_pretrained(models.source(name))(picture, return_tensors="pt")["pixel_values"]
    assert gap(found, rows(source, seen)) <= ROWS_F32
    if name != "activation-of-the-tower":  # which shows less than the runtime's tables of GELU do
        assert gap(found, rows(usual, seen)) > 10 * ROWS_F32


def rows(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the language model gets of a picture: (features, width)."""
    found = model.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    one: torch.Tensor = found[0] if isinstance(found, (list, tuple)) or found.dim() == 3 else found
    return one
