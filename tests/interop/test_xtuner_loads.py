"""Our `xtuner` outputs in `xtuner chat`, with the peft 0.12 that trained them, against our `hf` outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.interop.by_hand import assemble, pieces
from tests.interop.conftest import GOLDEN, PROMPT, QUESTION, Converter, Source, gap
from tests.interop.peer_programs import in_peer

pytestmark = pytest.mark.peers

# Every kind of adapter that adapter_config.json has to describe, and every combination of parts.
CASES = (
    "vitlora_rslora",
    "vitlora_dora",
    "vitlora_patterns",
    "vitlora_patterns_two_keys",
    "vitlora_bias_all",
    "vitlora_over_unfrozen_vit",
    "llmlora_patterns",
    "llmlora_dora",
    "llmlora_modules_to_save",
    "llmlora_some_modules",
    "llmlora_vit_frozen",
    "llmlora_vit_full",
    "llm_full_vit_frozen",
    "llm_frozen_vitlora",
    "pretrain_vit_full",
    "tied_embeddings",
    "tied_embeddings_llmlora",
    "base_fp16_llmlora",
    "output_sharded",
)
DEPTHS = ("projector_depth1", "projector_depth3")
NAMES = ("tiny", *GOLDEN, *CASES)
OLD_ROWS = 512
TOLERANCE = 1e-5  # measured: up to 5e-7


@dataclass(frozen=True)
class Seen:
    report: dict[str, Any]
    folder: Path

    def pixels(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}-pixels.npy"))

    def logits(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))


def _chat(found: Source, folder: Path) -> dict[str, str | None]:
    """What a user names: our folder, and the base of what is not whole in it."""
    whole_llm, whole_tower = (folder / "config.json").is_file(), (folder / "visual_encoder").is_dir()
    return {
        "llm": str(folder if whole_llm else found.bases / "llm"),
        "llava": str(folder),
        "visual_encoder": None if whole_tower else str(found.bases / "vit"),
    }


@pytest.fixture(scope="module")
def seen(
    converted: Converter, source: Callable[[str], Source], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """Every output in float32 by name; those of the default dtype, too, as NAME-default."""
    folder = tmp_path_factory.mktemp("xtuner-chat")
    chats = {name: _chat(source(name), converted(name, "xtuner", dtype="float32")) for name in (*NAMES, *DEPTHS)}
    chats |= {f"{name}-default": _chat(source(name), converted(name, "xtuner")) for name in ("tiny", *GOLDEN)}
    job = {"chats": chats, "picture": str(tiny / "picture.png"), "question": QUESTION, "folder": str(folder)}
    return Seen(in_peer("xtuner", "run_xtuner_chat.py", job, folder), folder)


@torch.inference_mode()
def hf_logits(folder: Path, bases: Path, pixels: torch.Tensor) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    before, after = pieces(bases, PROMPT)
    ids = torch.tensor([[*before, *[model.config.image_token_index] * 16, *after]])
    found: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits[0]
    return found[:, :OLD_ROWS]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_our_hf_output(
    seen: Seen, converted: Converter, source: Callable[[str], Source], name: str
) -> None:
    ours = hf_logits(converted(name, "hf", dtype="float32"), source(name).bases, seen.pixels(name))
    assert gap(seen.logits(name), ours) <= TOLERANCE


@pytest.mark.parametrize("name", DEPTHS)
def test_other_depths_of_the_projector(seen: Seen, source: Callable[[str], Source], name: str) -> None:
    found = source(name)
    wanted = assemble(found.pth, found.bases).logits(PROMPT, seen.pixels(name))
    assert gap(seen.logits(name), wanted) <= TOLERANCE


@pytest.mark.parametrize("name", ["tiny", *GOLDEN])
def test_default_dtype_differs_by_its_rounding_only(seen: Seen, name: str) -> None:
    """float16 holds 11 bits."""
    lost = gap(seen.logits(name), seen.logits(f"{name}-default"))
    assert lost <= 2e-3
    # What was frozen comes from its base, unrounded.
    assert (lost == 0.0) == (name == "c_pretrain")


def test_trained_model_answers(seen: Seen, tiny: Path) -> None:
    from transformers import AutoTokenizer

    said = AutoTokenizer.from_pretrained(tiny / "llm").decode(seen.report["tiny"]["generated"])
    assert said.removeprefix("<|begin_of_text|>") == "a red sun over green hills<|eot_id|>"
