"""Checkpoints by name, their conversions, and the environments of the programs that have to read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_convert
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.peer_programs import PEERS
from tests.interop.wide_models import PUBLISHED, WIDES, make_wide, published_file

GOLDEN = ("a_full_vitlora", "b_llmlora_vitlora", "c_pretrain", "d_full_fullvit")
QUESTION = "What is in this picture?"
# Llama-3's prompt as xtuner trains it; the BOS token goes in front.
PROMPT = (
    f"<|start_header_id|>user<|end_header_id|>\n\n<image>\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the folder that holds its base models as `llm/` and `vit/`."""

    pth: Path
    bases: Path


@pytest.fixture(scope="session")
def cases() -> Path:
    """Checkpoints that the real xtuner trained and converted here."""
    folder = PEERS / "cases"
    if not (folder / "cases.json").is_file():
        pytest.skip("no cases: `make peers`, then `.venvs/xtuner/bin/python tests/peers/xtuner_cases.py` makes them")
    return folder


@pytest.fixture(scope="session")
def source(
    tiny: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Source]:
    """A checkpoint by name: `tiny`, a golden case, a random wide model, or a case that the real xtuner made here."""
    wide: dict[str, Source] = {}

    def find(name: str) -> Source:
        if name == "tiny":
            return Source(tiny / "iter_2.pth", tiny)
        if name in WIDES:
            if name not in wide:
                published = published_file(WIDES[name], PEERS)
                if published is None and WIDES[name].tokenizer in PUBLISHED:
                    pytest.skip(f"no tokenizer of {WIDES[name].tokenizer}: `make peers` fetches it")
                folder = tmp_path_factory.mktemp(name)
                wide[name] = Source(make_wide(name, folder, tiny, published), folder)
            return wide[name]
        root: Path = request.getfixturevalue("golden" if name in GOLDEN else "cases")
        base = Path(json.loads((root / "cases.json").read_text())[name]["llm"]).parts[1]
        return Source(root / "cases" / name / "pth" / "iter_2.pth", root / "parts" / base)

    return find


@dataclass
class Converter:
    """Conversions of named checkpoints, each made once."""

    source: Callable[[str], Source]
    folder: Path
    made: dict[tuple[object, ...], Path] = field(default_factory=dict)

    def __call__(self, name: str, to: str, **options: str) -> Path:
        key = (name, to, *sorted(options.items()))
        if key not in self.made:
            words = "-".join(value.replace("/", "_") for value in options.values())
            out = self.folder / name / f"{to}-{words}".rstrip("-")
            llava_convert.convert(self.source(name).pth, to=to, out=out, **options)  # type: ignore[arg-type]
            self.made[key] = out
        return self.made[key]

    def onward(self, folder: Path, to: str, **options: Any) -> Path:
        """A conversion of a folder or file that an earlier one wrote."""
        key = (folder, to, *sorted(options.items()))
        if key not in self.made:
            out = self.folder / "onward" / str(len(self.made)) / "model"
            llava_convert.convert(folder, to=to, out=out, **options)
            self.made[key] = out
        return self.made[key]


@pytest.fixture(scope="session")
def converted(source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Converter:
    return Converter(source, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return LlamaCpp(tmp_path_factory.mktemp("llama.cpp"))


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """One picture as pixel values of a tower of 56 x 56, the same for every program: (1, 3, 56, 56)."""
    return torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def wide_picture() -> Image.Image:
    """A picture twice as wide as high."""
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (56, 112, 3), dtype=np.uint8))


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two sets of logits, relative to the largest logit where that is above one."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


def padded(picture: Image.Image) -> Image.Image:
    """A wide picture as xtuner's expand2square makes it: the image processor's mean colour above and below."""
    width, height = picture.size
    square = Image.new("RGB", (width, width), (122, 116, 104))
    square.paste(picture, (0, (width - height) // 2))
    return square
