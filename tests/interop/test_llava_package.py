"""Our `official` outputs in the llava package: LLaVA's own code, on transformers 4.37."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from tests.interop.by_hand import assemble, pieces
from tests.interop.conftest import GOLDEN, PROMPT, Converter, Source, gap, padded
from tests.interop.peer_programs import in_peer

pytestmark = pytest.mark.peers

# Each with what it is there for: another layer, one and three projector layers, a tied head, rows beyond the tokens.
CASES = (
    "visual_select_layer_last",
    "projector_depth1",
    "projector_depth3",
    "tied_embeddings",
    "tied_embeddings_llmlora",
    "llm_full_vit_frozen",
    "tokens512_rows576",
)
NAMES = ("tiny", *GOLDEN, *CASES)
FROZEN = ("c_pretrain", "llm_full_vit_frozen")
PROJECTOR_ALONE = "projector-alone"
TOWER = "model.vision_tower.vision_tower."
TOKENS = 512  # of every base's tokenizer here; LLaVA's loader cuts what rows there are beyond
TOLERANCE = 1e-5  # measured: up to 5e-7


def tower_id(name: str) -> str:
    """LLaVA takes a tower whose name starts like this, or which is a folder; here it is both."""
    return f"openai/{name}"


@dataclass(frozen=True)
class Seen:
    report: dict[str, Any]
    folder: Path

    def logits(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))


@pytest.fixture(scope="module")
def seen(
    converted: Converter,
    source: Callable[[str], Source],
    pixels: torch.Tensor,
    wide_picture: Image.Image,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    folder = tmp_path_factory.mktemp("llava")
    np.save(folder / "pixels.npy", pixels.numpy())
    wide_picture.save(folder / "wide.png")
    models = {}
    for name in NAMES:
        shutil.copytree(source(name).bases / "vit", folder / tower_id(name))
        models[name] = {"folder": str(official(converted, name))}
    alone = converted("c_pretrain", "official", visual_encoder_id=tower_id("c_pretrain"), part="projector")
    models[PROJECTOR_ALONE] = {"folder": str(alone), "base": str(source("c_pretrain").bases / "llm")}
    job = {
        "models": models,
        "prompt": PROMPT,
        "pixels": str(folder / "pixels.npy"),
        "picture": str(tiny / "picture.png"),
        "wide": str(folder / "wide.png"),
        "folder": str(folder),
    }
    return Seen(in_peer("llava", "run_official.py", job, folder), folder)


def official(converted: Converter, name: str) -> Path:
    return converted(name, "official", visual_encoder_id=tower_id(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_key_missing_or_left_over(seen: Seen, name: str) -> None:
    assert seen.report[name]["keys"] == []


@pytest.mark.parametrize("name", NAMES)
def test_loaded_weights_are_the_files(seen: Seen, converted: Converter, name: str) -> None:
    """Every tensor that we wrote is the one that the loaded model computes with, the tower's too."""
    loaded = load_file(seen.folder / f"{name}.safetensors")
    ours = load_file(official(converted, name) / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        ours[key] = ours[key][:TOKENS]
    different = [key for key, value in ours.items() if not torch.equal(value, loaded[key].to(value.dtype))]
    assert different == []
    assert any(key.startswith(TOWER) for key in ours) == (name not in FROZEN)


@pytest.mark.parametrize("name", NAMES)
def test_tower_is_the_trained_one(seen: Seen, source: Callable[[str], Source], converted: Converter, name: str) -> None:
    loaded = load_file(seen.folder / f"{name}.safetensors")
    base = load_file(source(name).bases / "vit" / "model.safetensors")
    config = json.loads((official(converted, name) / "config.json").read_text())
    assert config["unfreeze_mm_vision_tower"] == (name not in FROZEN)
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    moved = float((loaded[TOWER + key].float() - base[key].float()).abs().max())
    # Rounding to float16 moves these weights by less than 1e-4, training by more than 1e-3.
    assert moved == 0.0 if name in FROZEN else moved > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_parts_by_hand(
    seen: Seen, source: Callable[[str], Source], pixels: torch.Tensor, name: str
) -> None:
    """A tower that is not in the folder comes in float32 from its own."""
    found = source(name)
    layer = -1 if name == "visual_select_layer_last" else -2
    hand = assemble(found.pth, found.bases, dtype=torch.float16, select_layer=layer)
    if name in FROZEN:
        hand.tower = assemble(found.pth, found.bases).tower
    assert gap(seen.logits(name), hand.logits(PROMPT, pixels)[:, :TOKENS]) <= TOLERANCE


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FROZEN and not n.startswith("projector_depth")])
def test_logits_equal_those_of_our_hf_output(
    seen: Seen, converted: Converter, source: Callable[[str], Source], pixels: torch.Tensor, name: str
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(converted(name, "hf"), dtype=torch.float32)
    ids = seen.report[name]["ids"]
    at = ids.index(-200)
    expanded = torch.tensor([[*ids[:at], *[model.config.image_token_index] * 16, *ids[at + 1 :]]])
    with torch.inference_mode():
        ours = model(input_ids=expanded, pixel_values=pixels).logits[0]
    assert gap(seen.logits(name), ours[:, :TOKENS]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_tokenised_as_by_the_base(seen: Seen, source: Callable[[str], Source], name: str) -> None:
    before, after = pieces(source(name).bases, PROMPT)
    assert seen.report[name]["ids"] == [*before, -200, *after]


def test_trained_model_answers_and_stops(seen: Seen) -> None:
    assert seen.report["tiny"]["text"].removeprefix("<|begin_of_text|>") == "a red sun over green hills<|eot_id|>"


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "c_pretrain"])
def test_pictures_are_padded(seen: Seen, source: Callable[[str], Source], wide_picture: Image.Image, name: str) -> None:
    base = CLIPImageProcessor.from_pretrained(source(name).bases / "vit")
    wanted = base(padded(wide_picture), return_tensors="pt")["pixel_values"].numpy()
    assert float(np.abs(np.load(seen.folder / f"{name}-wide.npy") - wanted).max()) <= 1e-5


def test_projector_alone_on_its_base_is_the_whole_conversion(seen: Seen, converted: Converter) -> None:
    """`mm_projector.bin` beside its config, loaded over the base language model."""
    alone, whole = (load_file(seen.folder / f"{name}.safetensors") for name in (PROJECTOR_ALONE, "c_pretrain"))
    assert alone.keys() == whole.keys()
    assert [key for key, value in alone.items() if not torch.equal(value, whole[key])] == []
    one, other = (np.load(seen.folder / f"{name}.npy") for name in (PROJECTOR_ALONE, "c_pretrain"))
    assert float(np.abs(one - other).max()) == 0.0
