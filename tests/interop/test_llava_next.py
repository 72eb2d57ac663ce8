"""LLaVA-NeXT and LLaVA-OneVision: official and transformers' layout, held against the original code's own forward."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, LlavaNextProcessor, LlavaOnevisionProcessor

import llava_convert
from llava_convert.core.errors import UnsupportedError, UsageError
from tests.gguf_models import CLIP_KEYS, vision_tensors
from tests.gguf_models import write as write_gguf
from tests.interop.conftest import Converter, gap
from tests.interop.fact_models import TOKENS, Made, config_of, fill
from tests.interop.llama_cpp import LlamaCpp, llm_file
from tests.interop.next_reference import Official, best
from tests.interop.test_llama_cpp import MARKER, prompt

TOLERANCE = 1e-5
SIDE = 56
# Square, wide, tall, tiny, huge; and one whose sides divide by nothing.
SIZES = {"square": (56, 56), "wide": (170, 40), "tall": (31, 140), "tiny": (3, 2), "huge": (900, 700), "odd": (97, 61)}
NEXT = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SMALL = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "generation_config", "preprocessor")
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model of a class of transformers' LLaVAs. `name` is that class's beginning."""

    name: str
    family: str
    tower: str = "clip"
    top: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    @property
    def is_onevision(self) -> bool:
        return self.name == "LlavaOnevision"


def onevision(**more: Any) -> dict[str, Any]:
    sizes = [[SIDE * i, SIDE * j] for i in range(1, 7) for j in range(1, 7)]
    return {
        "model_type": "llava_onevision", "image_grid_pinpoints": sizes, "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "video_token_index": 514, **more,
    }  # fmt: skip


# transformers has height before width: of (56, 112) and (112, 56) the first decides what a square becomes.
_NEXT = {"model_type": "llava_next", "image_grid_pinpoints": [[h, w] for w, h in NEXT]}
KINDS = {
    "next-llama": Kind("LlavaNext", "llama", top=_NEXT),
    "next-mistral": Kind("LlavaNext", "mistral", top=_NEXT),
    "next-lopsided": Kind("LlavaNext", "qwen2", top=_NEXT | {"image_grid_pinpoints": [[56, 168], [56, 112]]}),
    "next-siglip": Kind(
        "LlavaNext", "qwen2", "siglip",
        top=_NEXT | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "onevision": Kind("LlavaOnevision", "qwen2", "siglip", top=onevision()),
    "onevision-tied": Kind("LlavaOnevision", "qwen2", "siglip", onevision(), {"tie_word_embeddings": True}),
    "onevision-clip": Kind(
        "LlavaOnevision", "llama", top=onevision(vision_feature_layer=-2, vision_feature_select_strategy="default")
    ),
}  # fmt: skip


def config_for(kind: Kind) -> dict[str, Any]:
    config = config_of(Made(kind.top, kind.text, {}, kind.family, "clip"))
    config["architectures"] = [f"{kind.name}ForConditionalGeneration"]
    config["tie_word_embeddings"] = bool(kind.text.get("tie_word_embeddings"))
    if kind.tower == "siglip":
        same = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "num_channels")
        vision = {key: config["vision_config"][key] for key in same}
        config["vision_config"] = {**vision, **SIGLIP, "num_hidden_layers": 2, "torch_dtype": "float32"}
    if kind.is_onevision:
        del config["image_seq_length"]
    return config


def made(folder: Path, base: Path, kind: Kind) -> Path:
    """A model that transformers builds and saves, in the names of every release, with `base`'s small files."""
    config = config_for(kind)
    own = getattr(transformers, f"{kind.name}Config").from_dict(copy.deepcopy(config))
    model = getattr(transformers, f"{kind.name}ForConditionalGeneration")(own)
    fill(model)
    with torch.no_grad():
        model.model.image_newline.copy_(torch.linspace(-1, 1, 64))
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    classic = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v for k, v in saved.items()}
    save_file(classic, folder / "model.safetensors", {"format": "pt"})
    for file in base.iterdir():
        if file.name.startswith(SMALL):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    if kind.tower == "siglip":
        half = [0.5, 0.5, 0.5]
        said = {"image_processor_type": f"{kind.name}ImageProcessor", "image_mean": half, "image_std": half}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, converted: Converter) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("next")
    return {name: made(folder / name, converted("tiny", "hf"), kind) for name, kind in KINDS.items()}


def published_tower(folder: Path) -> dict[str, Any]:
    """The config that the id of the tower stands for: of a SigLIP, before the code cuts it."""
    tower: dict[str, Any] = json.loads((folder / "config.json").read_text())["vision_config"]
    return {**tower, "num_hidden_layers": 3} if tower["model_type"] == "siglip_vision_model" else tower


def picture(name: str) -> Image.Image:
    width, height = SIZES[name]
    pixels = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Tokenized:
    """The part of a processor that needs no video processor, which wants torchvision."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        said = json.loads((folder / "processor_config.json").read_text())
        self.images = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        more = {k: v for k, v in said.items() if k != "processor_class"}
        if kind.is_onevision:
            self.processor = object.__new__(LlavaOnevisionProcessor)
            more = {"image_processor": self.images, "tokenizer": self.tokenizer, **more}
            for key, value in more.items():
                setattr(self.processor, key, value)
        else:
            self.processor = LlavaNextProcessor(self.images, self.tokenizer, **more)
        assert said["processor_class"] == type(self.processor).__name__

    def features(self, size: tuple[int, int]) -> int:
        """How many <image> a picture of (width, height) becomes."""
        less = self.processor.vision_feature_select_strategy == "default"
        return int(self.processor._get_number_of_features(size[1], size[0], SIDE, SIDE)) - less


class Loaded:
    """transformers' own, from files to features and logits."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        kindred = getattr(transformers, f"{kind.name}ForConditionalGeneration")
        self.model, report = kindred.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.model.eval()
        self.told = Tokenized(folder, kind)

    def inputs(self, name: str) -> dict[str, Any]:
        found = self.told.images(picture(name), return_tensors="pt")
        return {"pixel_values": found["pixel_values"], "image_sizes": found["image_sizes"]}

    @torch.inference_mode()
    def features(self, name: str) -> torch.Tensor:
        """What the language model gets of a picture: (features, width)."""
        found = self.model.get_image_features(**self.inputs(name))
        rows = getattr(found, "pooler_output", found)
        one: torch.Tensor = rows[0]
        return one

    @torch.inference_mode()
    def logits(self, name: str, before: list[int], after: list[int]) -> torch.Tensor:
        ids = [*before, *[self.model.config.image_token_index] * self.told.features(SIZES[name]), *after]
        found: torch.Tensor = self.model(input_ids=torch.tensor([ids]), **self.inputs(name)).logits[0]
        return found


BEFORE, AFTER = [448, 300, 301], [302, 303, 304, 305, 306]


@pytest.mark.parametrize("name", KINDS)
def test_official_to_hf_and_back(sources: dict[str, Path], converted: Converter, name: str) -> None:
    """The original code's forward on the official folder, and transformers' on its conversion."""
    source, kind = sources[name], KINDS[name]
    official = converted.onward(source, "official", dtype="float32")
    back = converted.onward(official, "hf", dtype="float32")
    reference = Official(official, published_tower(source))
    loaded = Loaded(back, kind)
    for size in SIZES:
        seen = reference.features(picture(size))
        assert loaded.told.features(SIZES[size]) == len(seen), size
        assert gap(loaded.features(size), seen) <= TOLERANCE, size
        mine = reference.logits(picture(size), BEFORE, AFTER)
        theirs = loaded.logits(size, BEFORE, AFTER)
        assert gap(theirs[:, :TOKENS], mine[:, :TOKENS]) <= TOLERANCE, size
    first, last = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert first.keys() == last.keys()
    for key, value in first.items():
        assert torch.equal(value, last[key][: len(value)]), key
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    for key in ("model_type", "architectures", *kind.top):
        assert theirs[key] == mine[key] or key == "video_token_index", key
    assert llava_convert.verify(source, official) and llava_convert.verify(official, back)


@pytest.mark.parametrize("name", KINDS)
def test_twenty_tokens(sources: dict[str, Path], converted: Converter, name: str) -> None:
    """Greedy ones, of the original code's forward and of transformers', about a wide picture in several tiles."""
    official = converted.onward(sources[name], "official", dtype="float32")
    reference = Official(official, published_tower(sources[name]))
    loaded = Loaded(converted.onward(official, "hf", dtype="float32"), KINDS[name])
    mine, theirs = list(AFTER), list(AFTER)
    for _ in range(20):
        mine.append(next_token(reference.logits(picture("wide"), BEFORE, mine), mine))
        theirs.append(next_token(loaded.logits("wide", BEFORE, theirs), theirs))
    assert mine == theirs


def next_token(logits: torch.Tensor, said: list[int]) -> int:
    """The likeliest that was not said: models as small as these repeat themselves, and twenty tokens would be one."""
    last = logits[-1, :TOKENS].clone()
    last[said] = -torch.inf
    return int(last.argmax())


def test_facts_of_the_official_config(sources: dict[str, Path], converted: Converter) -> None:
    said = json.loads((converted.onward(sources["onevision"], "official", dtype="float32") / "config.json").read_text())
    assert said["image_aspect_ratio"] == "anyres_max_9" and said["mm_patch_merge_type"] == "spatial_unpad"
    assert said["image_grid_pinpoints"][1] == [112, 56]  # of transformers' (56, 112), height first
    assert (said["mm_vision_select_layer"], said["mm_vision_select_feature"]) == (-2, "patch")
    assert said["architectures"] == ["LlavaQwenForCausalLM"]


@pytest.mark.parametrize(
    "written", ["[(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)]", "(1x1),...,(2x2)"], ids=["text", "range"]
)
def test_pinpoints_in_other_spellings(
    sources: dict[str, Path], converted: Converter, tmp_path: Path, written: str
) -> None:
    shutil.copytree(converted.onward(sources["next-llama"], "official", dtype="float32"), tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    (tmp_path / "o" / "config.json").write_text(json.dumps({**config, "image_grid_pinpoints": written}))
    llava_convert.convert(tmp_path / "o", to="hf", out=tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())["image_grid_pinpoints"]
    wide = [[112, 56], [56, 112], [112, 112], [56, 168], [168, 56]]
    assert found == (wide if "...," not in written else [[56, 56], [112, 56], [56, 112], [112, 112]])
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_grid_pinpoints"] == found


@pytest.mark.parametrize("name", ["next-llama", "onevision"])
@pytest.mark.parametrize("to", ["gguf", "xtuner"])
def test_layouts_that_cannot_state_it(sources: dict[str, Path], tmp_path: Path, name: str, to: str) -> None:
    with pytest.raises(UnsupportedError, match=r"anyres|vision_feature_select_strategy is full") as refused:
        llava_convert.convert(sources[name], to=to, out=tmp_path / "out")
    assert refused.value.exit_code == 4 and "official" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.peers
def test_what_llama_cpp_sees_instead(
    sources: dict[str, Path], converted: Converter, llama_cpp: LlamaCpp, tiny: Path, tmp_path: Path
) -> None:
    """Why that is refused: the grid keys and image_newline are read, and the features are others, by their number.

    A picture that is no larger than a tile gets no tiles; of others no border is taken off, and no row of tiles ends.
    """
    tensors = vision_tensors(tiny / "vit") | {"v.image_newline": np.ones(64, dtype=np.float32)}
    grid = [length for size in NEXT for length in size]
    keys = {"clip.vision.image_grid_pinpoints": grid, "clip.vision.mm_patch_merge_type": "spatial_unpad"}
    mmproj = write_gguf(tmp_path / "mmproj.gguf", "clip", CLIP_KEYS | keys, tensors, "F32")
    model = llm_file(converted("tiny", "gguf", outtype="f16"), "f16")
    tasks = {}
    for size in SIZES:
        np.save(tmp_path / f"{size}.npy", np.asarray(picture(size)))
        file = tmp_path / f"{size}.npy"
        tasks[size] = {"model": model, "mmproj": mmproj, "picture": file, "prompt": prompt(MARKER), "count": 1}
    found = llama_cpp.ask(**{size: {"kind": "picture", **task} for size, task in tasks.items()})
    official = converted.onward(sources["next-llama"], "official", dtype="float32")
    reference = Official(official, published_tower(sources["next-llama"]))
    trained = {size: len(reference.features(picture(size))) for size in SIZES}
    assert trained == {"square": 36, "wide": 42, "tall": 52, "tiny": 26, "huge": 70, "odd": 70}
    runtime = {size: sum(one["rows"]) for size, one in found.items()}
    whole = {size: best(pair, NEXT) for size, pair in SIZES.items() if max(pair) > SIDE}
    tile = (SIDE // 14) ** 2
    tiles = {size: tile * (1 + width * height // SIDE**2) for size, (width, height) in whole.items()}
    assert runtime == {"square": tile, "tiny": tile, **tiles}
    assert not set(runtime.items()) & set(trained.items())


def test_merges_that_transformers_has_no_class_for(
    sources: dict[str, Path], converted: Converter, tmp_path: Path
) -> None:
    shutil.copytree(converted.onward(sources["next-llama"], "official", dtype="float32"), tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    (tmp_path / "o" / "config.json").write_text(json.dumps({**config, "mm_patch_merge_type": "spatial"}))
    with pytest.raises(UnsupportedError, match="mm_patch_merge_type is spatial "):
        llava_convert.convert(tmp_path / "o", to="hf", out=tmp_path / "hf")


def test_a_newline_position_matters_to_videos_alone(
    sources: dict[str, Path], converted: Converter, tmp_path: Path
) -> None:
    """LLaVA-Video's."""
    shutil.copytree(converted.onward(sources["onevision"], "official", dtype="float32"), tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    (tmp_path / "o" / "config.json").write_text(json.dumps({**config, "mm_newline_position": "grid"}))
    told = llava_convert.convert(tmp_path / "o", to="hf", out=tmp_path / "hf")
    assert any("video" in warning and "grid" in warning for warning in told.warnings)


def test_a_processor_that_leaves_no_choice(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not apply"):
        llava_convert.convert(
            sources["next-llama"], to="hf", dtype="float16", image_processor="llava", out=tmp_path / "o"
        )


def test_a_tower_that_was_frozen_is_cut(sources: dict[str, Path], converted: Converter, tmp_path: Path) -> None:
    """Its base is whole, with the block and the head that the code cuts off."""
    official = tmp_path / "o"
    shutil.copytree(converted.onward(sources["onevision"], "official", dtype="float32"), official)
    state = load_file(official / "model.safetensors")
    start = "model.vision_tower.vision_tower."
    tower = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    save_file(
        {k: v for k, v in state.items() if not k.startswith(start)}, official / "model.safetensors", {"format": "pt"}
    )
    config = published_tower(sources["onevision"]) | {"vision_use_head": True}
    whole: nn.Module = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
    flat = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in whole.state_dict().items()}
    (tmp_path / "siglip").mkdir()
    save_file(
        {k: v.contiguous() for k, v in (flat | tower).items()},
        tmp_path / "siglip" / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(config | {"architectures": ["SiglipVisionModel"]}))
    out = llava_convert.convert(
        official, to="hf", out=tmp_path / "hf", visual_encoder=str(tmp_path / "siglip"), max_shard_size="5GB"
    ).out
    first, last = (load_file(folder / "model.safetensors") for folder in (sources["onevision"], Path(str(out))))
    eyes = {k for k in first if k.startswith("vision_tower.")}
    assert eyes == {k for k in last if k.startswith("vision_tower.")}
    assert all(torch.equal(first[k], last[k]) for k in eyes)
