"""Our `hf` and `xtuner` outputs in older releases of transformers, against what this one makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from tests.interop.by_hand import assemble, pieces
from tests.interop.conftest import GOLDEN, PROMPT, QUESTION, Converter, Source, gap, padded
from tests.interop.peer_programs import in_peer

pytestmark = pytest.mark.peers

VERSIONS = ("4.37", "4.46", "4.57")
# Bases that have burnt readers: tied head, ids at the edge of the rows, another layer of the tower.
CASES = ("tied_embeddings", "tied_embeddings_llmlora", "tokens510_rows510", "visual_select_layer_last")
NAMES = ("tiny", *GOLDEN, *CASES)
TOLERANCE = 1e-5
ROPE = [500000.0 ** (-2 * i / 16) for i in range(8)]


@dataclass(frozen=True)
class Seen:
    """What an old release said, and where its logits lie."""

    report: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def prompts(source: Callable[[str], Source]) -> dict[str, list[list[int]]]:
    return {name: pieces(source(name).bases, PROMPT) for name in NAMES}


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))


def _image_processors(converted: Converter, version: str) -> dict[str, str]:
    """4.37 reads no processor of ours, and LLaVA's own image processor came with 4.52."""
    kinds = {"4.37": (), "4.46": ("clip",), "4.57": ("clip", "llava")}[version]
    return {kind: str(converted("tiny", "hf", image_processor=kind)) for kind in kinds}


@pytest.fixture(scope="module", params=VERSIONS)
def seen(
    request: pytest.FixtureRequest,
    converted: Converter,
    prompts: dict[str, list[list[int]]],
    pixels: torch.Tensor,
    features: torch.Tensor,
    tiny: Path,
    wide_picture: Image.Image,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
    np.save(folder / "pixels.npy", pixels.numpy())
    np.save(folder / "features.npy", features.numpy())
    wide_picture.save(folder / "wide.png")
    job = {
        "models": {name: str(converted(name, "hf")) for name in NAMES},
        "image_processors": _image_processors(converted, request.param),
        "wide": str(folder / "wide.png"),
        "projectors": {name: str(converted(name, "xtuner") / "projector") for name in GOLDEN},
        "prompts": prompts,
        "pixels": str(folder / "pixels.npy"),
        "features": str(folder / "features.npy"),
        "picture": str(tiny / "picture.png"),
        "question": QUESTION,
        "folder": str(folder),
    }
    report = in_peer(f"transformers-{request.param}", "run_hf.py", job, folder)
    assert report["version"].startswith(request.param)
    return Seen(report, folder)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_missing_or_left_over(seen: Seen, name: str) -> None:
    assert seen.report["models"][name]["keys"] == []


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_this_release(
    seen: Seen, converted: Converter, prompts: dict[str, list[list[int]]], pixels: torch.Tensor, name: str
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(converted(name, "hf"), dtype=torch.float32)
    before, after = prompts[name]
    ids = torch.tensor([[*before, *[model.config.image_token_index] * 16, *after]])
    with torch.inference_mode():
        ours = model(input_ids=ids, pixel_values=pixels).logits[0]
    assert gap(torch.from_numpy(np.load(seen.folder / f"{name}.npy")), ours) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_rope_frequencies_are_those_of_theta_500000(seen: Seen, name: str) -> None:
    assert seen.report["models"][name]["inv_freq"] == pytest.approx(ROPE, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_dtype_by_itself(seen: Seen, name: str) -> None:
    assert seen.report["models"][name]["auto_dtypes"] == ["torch.float16"]


@pytest.mark.parametrize("name", NAMES)
def test_processor_and_generation(seen: Seen, name: str) -> None:
    """4.37 has no LLaVA processor that reads these files; there the model is given ids."""
    found = seen.report["models"][name]
    assert len(found["eos"]) == 2
    assert found["generated"] and (len(found["generated"]) == 24 or found["generated"][-1] in found["eos"])
    if seen.report["version"].startswith("4.37"):
        return
    assert found["input_ids"] == found["wanted_ids"]
    assert found["input_ids"].count(found["bos"]) == 1
    if name == "tiny":
        assert found["text"] == "a red sun over green hills<|eot_id|>"


def test_image_processors_crop_or_pad(seen: Seen, tiny: Path, wide_picture: Image.Image) -> None:
    wanted = {"clip": wide_picture, "llava": padded(wide_picture)}
    classes = {"clip": "CLIPImageProcessor", "llava": "LlavaImageProcessor"}
    base = CLIPImageProcessor.from_pretrained(tiny / "vit")
    for kind, name in seen.report["image_processors"].items():
        assert name == classes[kind]
        pixels = base(wanted[kind], return_tensors="pt")["pixel_values"].numpy()
        assert float(np.abs(np.load(seen.folder / f"{kind}-wide.npy") - pixels).max()) <= 1e-5
    found = sorted(seen.report["image_processors"])
    assert found == {"4.37": [], "4.46": ["clip"], "4.57": ["clip", "llava"]}[seen.report["version"][:4]]


@pytest.mark.parametrize("name", GOLDEN)
def test_projector_runs_by_its_own_code(
    seen: Seen, source: Callable[[str], Source], features: torch.Tensor, name: str
) -> None:
    assert seen.report["projectors"][name] == {"keys": [], "class": "ProjectorModel"}
    found = source(name)
    with torch.inference_mode():
        wanted = assemble(found.pth, found.bases).projector(features).numpy()
    assert float(np.abs(np.load(seen.folder / f"{name}-projector.npy") - wanted).max()) <= 1e-6
