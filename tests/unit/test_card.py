"""README.md of an output: true, short, and without a trace of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import llava_convert
from llava_convert import __version__

Make = Callable[..., str]


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    def go(to: str, **options: Any) -> str:
        llava_convert.convert(tiny / "iter_2.pth", to=to, out=tmp_path / "my-llava", **options)
        return (tmp_path / "my-llava" / "README.md").read_text(encoding="utf-8")

    return go


@pytest.mark.parametrize(("to", "library"), [("hf", "transformers"), ("xtuner", "xtuner"), ("official", "llava")])
def test_front_matter_against_the_hub_library(make: Make, to: str, library: str) -> None:
    card = ModelCard(make(to, llm_id="meta/tiny", visual_encoder_id="openai/tiny"))
    data = card.data.to_dict()
    assert (data["pipeline_tag"], data["library_name"], data["tags"]) == ("image-text-to-text", library, ["llava"])
    if to != "xtuner":
        assert data["base_model"] == ["meta/tiny", "openai/tiny"]
    assert card.text.strip().startswith("# my-llava")


def test_folder_names_are_no_base_models(make: Make) -> None:
    front = yaml.safe_load(make("hf").split("---")[1])
    assert "base_model" not in front


def test_what_it_says_of_hf(make: Make) -> None:
    text = make("hf")
    assert 'LlavaForConditionalGeneration.from_pretrained("my-llava", torch_dtype="auto")' in text
    assert "Rows 512 to 575 of the vocabulary were added" in text
    assert "| tensors | 80: 0 copied byte for byte, 18 with LoRA merged in |" in text
    assert f"| made by | llava-convert {__version__} |" in text
    assert "| checked | headers and files |" in text
    assert "`--image-processor llava` pads" in text


def test_what_it_does_not_say(make: Make) -> None:
    text = make("hf", image_processor="llava", verify="full", name="Other name")
    assert "`--image-processor llava` pads" not in text
    assert "# Other name\n" in text and "my-llava" not in text
    assert "| checked | every byte, recomputed from the source |" in text


def test_official(make: Make) -> None:
    text = make("official", verify="off")
    assert "load_pretrained_model" in text and "Rows " not in text
    assert "| checked | not at all |" in text


def test_copies_are_counted(make: Make, tmp_path: Path) -> None:
    make("official")
    llava_convert.convert(tmp_path / "my-llava", to="hf", out=tmp_path / "hf")
    assert "| tensors | 80: 78 copied byte for byte, 0 with LoRA" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("to", ["hf", "official", "xtuner"])
def test_no_path(make: Make, tmp_path: Path, to: str) -> None:
    text = make(to)
    assert str(tmp_path) not in text and "fixtures" not in text and str(Path.home()) + "/" not in text


def test_one_part_is_not_called_a_whole_model(make: Make) -> None:
    text = make("hf", part="llm")
    assert "LlavaForConditionalGeneration" not in text
