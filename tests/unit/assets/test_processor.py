"""preprocessor_config.json and processor_config.json, as every base writes them and as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from llava_convert.assets.processor import preprocessor_config, processor_config
from llava_convert.core.errors import InputError, UnsupportedError, UsageError

CLIP = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14}
# openai/clip-vit-large-patch14-336 as it is on the Hub.
OPENAI = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}


def test_golden(golden: Path) -> None:
    """The real converter's own two files, from the same base."""
    base = json.loads((golden / "parts/plain/vit/preprocessor_config.json").read_text())
    for layout, for_hf in (("official", False), ("huggingface", True)):
        real = json.loads((golden / "cases/a_full_vitlora" / layout / "preprocessor_config.json").read_text())
        for source in (base, None):
            assert preprocessor_config(source, CLIP, "clip", for_hf) == real
    assert list(preprocessor_config(base, CLIP, "clip", True)) == sorted(real)


def test_plain_numbers_of_the_first_clip() -> None:
    found = preprocessor_config(OPENAI, CLIP | {"image_size": 336}, "clip", True)
    assert found["size"] == {"shortest_edge": 336}
    assert found["crop_size"] == {"height": 336, "width": 336}
    assert found["image_processor_type"] == "CLIPImageProcessor"
    assert found["rescale_factor"] == 1 / 255
    assert "feature_extractor_type" not in found


def test_nested_form_of_transformers_5() -> None:
    plain = preprocessor_config(None, CLIP, "clip", False)
    inner = plain | {
        "image_processor_type": "CLIPImageProcessorFast",
        "data_format": "channels_first",
        "image_std": [1, 1, 1],
    }
    nested = {"image_processor": inner, "processor_class": "CLIPProcessor"}
    assert preprocessor_config(nested, CLIP, "clip", False) == plain | {"image_std": [1, 1, 1]}


def test_llava_pads_and_only_in_the_transformers_layout() -> None:
    padded = preprocessor_config(None, CLIP, "llava", True)
    assert (padded["image_processor_type"], padded["do_pad"]) == ("LlavaImageProcessor", True)
    assert preprocessor_config(None, CLIP, "llava", False) == preprocessor_config(None, CLIP, "clip", False)
    assert "do_pad" not in preprocessor_config(None, CLIP, "clip", True)


def test_siglip() -> None:
    found = preprocessor_config(None, SIGLIP, "clip", True)
    assert found["image_processor_type"] == "SiglipImageProcessor"
    assert found["size"] == {"height": 56, "width": 56}
    assert "crop_size" not in found
    assert preprocessor_config(None, SIGLIP, "llava", True)["do_center_crop"] is False


@pytest.mark.parametrize("vision", [CLIP, SIGLIP])
@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_transformers_makes_the_pixels(tmp_path: Path, vision: dict[str, Any], kind: Any) -> None:
    config = preprocessor_config(None, vision, kind, True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    read = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(read).__name__.removesuffix("Pil").removesuffix("Fast") == config["image_processor_type"]
    # White on the left, black on the right, twice as wide as high: cropped, padded and squeezed pictures all differ.
    picture = np.zeros((56, 112, 3), dtype=np.uint8)
    picture[:, :28] = 255
    pixels = np.asarray(read(Image.fromarray(picture), return_tensors="np")["pixel_values"][0])
    assert pixels.shape == (3, 56, 56)
    mean, std = (np.array(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    shown = pixels * std + mean
    if kind == "llava":
        # The rows above the picture hold the mean colour, which normalises to zero, to a step of 1/255.
        assert np.abs(pixels[:, :10]).max() < 1 / 255 / 0.26
        assert np.abs(shown[:, 28, :10] - 1).max() < 0.01
    elif vision is CLIP:
        assert np.abs(shown[:, :, :]).max() < 0.01  # the middle square: black throughout
    else:
        assert np.abs(shown[:, :, :10] - 1).max() < 0.01  # squeezed to a square: white on the left
        assert np.abs(shown[:, :, 20:]).max() < 0.1


def test_another_image_size_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"336.*takes 56 x 56"):
        preprocessor_config(OPENAI, CLIP, "clip", True)


def test_an_unknown_tower_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="dinov2"):
        processor_config({"model_type": "dinov2", "patch_size": 14})


def test_an_unknown_kind_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'vit'"):
        preprocessor_config(None, CLIP, "vit", False)


def test_processor_config() -> None:
    assert processor_config(CLIP) == {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    siglip = processor_config(SIGLIP, "full", "<img>")
    assert siglip["num_additional_image_tokens"] == 0
    assert siglip["vision_feature_select_strategy"] == "full"
    assert siglip["image_token"] == "<img>"
