"""preprocessor_config.json and processor_config.json, in the shape that transformers 4.46 to 5.x read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN, VIDEO_TOKEN
from llava_convert.core.errors import InputError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_BICUBIC = 3
_COLOURS = ("image_mean", "image_std", "rescale_factor", "do_convert_rgb")
_OF_TILES = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
# Read by nobody, or about the folder that the file came from; 5.x's device and data_format are arguments of a call.
_STALE = ("processor_class", "feature_extractor_type", "_valid_processor_keys", "data_format", "device", "auto_map")


def preprocessor_config(
    base: Mapping[str, Any] | None, vision_config: Mapping[str, Any], kind: str, for_hf: bool
) -> dict[str, Any]:
    """How a picture becomes pixels.

    `base` is the tower's preprocessor_config.json or a 5.x processor_config.json which holds it; without one the
    family's defaults for the tower's image size are taken. `kind="llava"` pads to a square first, as xtuner and LLaVA
    trained, where "clip" crops the middle: the two differ on every picture that is not square. It is for transformers
    4.52 on, and only for its layout (`for_hf`): official LLaVA pads by itself (`image_aspect_ratio`).
    Raises UsageError for another kind, InputError where `base` is for another image size than the tower.
    """
    if kind not in ("clip", "llava"):
        raise UsageError(f"unknown image processor {kind!r}", hint="--image-processor takes clip or llava")
    defaults = _defaults(vision_config)
    found = _flat(base) if base is not None else {}
    if _slow(str(found.get("image_processor_type"))) in _OF_TILES:  # its sizes are those of tiles
        found = {key: value for key, value in found.items() if key in _COLOURS}
    config = defaults | {key: value for key, value in found.items() if value is not None}
    config["image_processor_type"] = _slow(str(config["image_processor_type"]))
    if "Siglip" in config["image_processor_type"] and "crop_size" not in found:
        config.pop("crop_size", None)
    _check_size(config, int(vision_config["image_size"]))
    if not for_hf:
        return dict(sorted(config.items()))
    config["processor_class"] = "LlavaProcessor"
    if kind == "llava":
        config["image_processor_type"] = "LlavaImageProcessor"
        config["do_pad"] = True
        config.setdefault("do_center_crop", False)  # SigLIP's has no such step, LLaVA's does it unless told
    return dict(sorted(config.items()))


def tile_processors(
    own: Mapping[str, Any], vision_config: Mapping[str, Any], kind: str, pinpoints: list[list[int]]
) -> dict[str, dict[str, Any]]:
    """The files that say how LLaVA-NeXT or OneVision (`kind`) cut a picture into tiles, by name.

    `own` is the tower's preprocessor_config, `pinpoints` are pairs of height and width. Every tile has the tower's size
    already, so that neither class changes it. OneVision's video processor has a file of its own from 4.52 on.
    """
    side = int(vision_config["image_size"])
    square = {"height": side, "width": side}
    common = {key: own[key] for key in (*_COLOURS, "do_normalize", "do_rescale", "do_resize") if key in own}
    common |= {"processor_class": processor_class(kind), "resample": own["resample"]}
    tiles = {**common, "do_pad": True, "image_grid_pinpoints": pinpoints}
    if kind == "llava_next":
        more = {"crop_size": square, "do_center_crop": True, "image_processor_type": "LlavaNextImageProcessor"}
        return {"preprocessor_config.json": dict(sorted({**tiles, **more, "size": {"shortest_edge": side}}.items()))}
    tiles |= {"image_processor_type": "LlavaOnevisionImageProcessor", "size": square}
    video = {**common, "video_processor_type": "LlavaOnevisionVideoProcessor", "size": square}
    files = {"preprocessor_config.json": tiles, "video_preprocessor_config.json": video}
    return {name: dict(sorted(content.items())) for name, content in files.items()}


def processor_class(kind: str) -> str:
    """The processor of a model type of transformers' LLaVAs."""
    return {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}.get(kind, "LlavaOnevisionProcessor")


def processor_config(
    vision_config: Mapping[str, Any],
    strategy: str = "default",
    image_token: str = IMAGE_TOKEN,
    *,
    kind: str = "llava",
    aspect: str = "",
) -> dict[str, Any]:
    """How many `image_token` a picture becomes: (image/patch)^2, one more for a class token, one less for "default".

    Without `num_additional_image_tokens` transformers 4.52 on make 575 tokens for CLIP-L/336's 576 features; without
    `patch_size` they raise a TypeError (measured). OneVision's processor is told the tower's features themselves, and
    `aspect`, which says how many tiles' features a picture has at most.
    """
    more = 0 if _is_siglip(vision_config) else 1
    config = {
        "image_token": image_token,
        "processor_class": processor_class(kind),
        "vision_feature_select_strategy": strategy,
    }
    if kind == "llava_onevision":
        side = int(vision_config["image_size"]) // int(vision_config["patch_size"])
        own: dict[str, Any] = {
            "num_image_tokens": side * side + more,
            "video_token": VIDEO_TOKEN,
            "vision_aspect_ratio": aspect,
        }
    else:
        own = {"num_additional_image_tokens": more, "patch_size": vision_config["patch_size"]}
    return dict(sorted((config | own).items()))


def _is_siglip(vision_config: Mapping[str, Any]) -> bool:
    """SigLIP's tower has no class token, CLIP's has one."""
    kind = str(vision_config.get("model_type", ""))
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedError(f"vision tower of type {kind!r}: known are clip_vision_model and siglip_vision_model")
    return kind == "siglip_vision_model"


def _defaults(vision_config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of CLIPImageProcessor or SiglipImageProcessor, for the tower's image size."""
    side = int(vision_config["image_size"])
    square = {"height": side, "width": side}
    common = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "resample": _BICUBIC, "rescale_factor": 1 / 255,
    }  # fmt: skip
    if _is_siglip(vision_config):
        half = [0.5, 0.5, 0.5]
        own = {"image_processor_type": "SiglipImageProcessor", "image_mean": half, "image_std": half, "size": square}
        return common | own
    return common | {
        "crop_size": square,
        "do_center_crop": True,
        "image_mean": _CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _CLIP_STD,
        "size": {"shortest_edge": side},
    }


def _slow(name: str) -> str:
    """The class that every release has; 5.x names the faster one and the one of PIL."""
    return name.removesuffix("Fast").removesuffix("Pil")


def _flat(base: Mapping[str, Any]) -> dict[str, Any]:
    """A base's settings, whichever release wrote them."""
    nested = base.get("image_processor")
    found = dict(nested if isinstance(nested, dict) else base)
    old_name = found.get("feature_extractor_type")
    if old_name and "image_processor_type" not in found:
        found["image_processor_type"] = str(old_name).replace("FeatureExtractor", "ImageProcessor")
    # openai/clip-vit-large-patch14-336 still has plain numbers.
    if isinstance(side := found.get("size"), int):
        found["size"] = {"shortest_edge": side}
    if isinstance(side := found.get("crop_size"), int):
        found["crop_size"] = {"height": side, "width": side}
    return {key: value for key, value in found.items() if key not in _STALE}


def _check_size(config: Mapping[str, Any], side: int) -> None:
    """What comes out of the steps must be what the tower takes."""
    last = config["crop_size"] if config.get("do_center_crop") else config["size"]
    if isinstance(last, dict) and any(value != side for value in last.values()):
        raise InputError(
            f"the image processor makes pictures of {last}, the vision tower takes {side} x {side}",
            hint="give the vision tower that the checkpoint was trained with by --visual-encoder",
        )


def squared(picture: Image, colour: tuple[int, ...]) -> Image:
    """The picture in the middle of a square of that colour (xtuner 0.1.23, dataset/utils.py, expand2square)."""
    from PIL import Image as pillow  # of the extras that look at pictures

    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = pillow.new(picture.mode, (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
