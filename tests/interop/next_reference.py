"""How LLaVA-NeXT's code sees a picture, read in its source and expressed again: tiles, features, their order.

From LLaVA-NeXT at df17966: `process_anyres_image` and what it calls (llava/mm_utils.py), `prepare_inputs_labels_for_
multimodal` for one picture (llava/model/llava_arch.py), `CLIPVisionTower` and `SigLipVisionTower`
(llava/model/multimodal_encoder). Nothing here goes through the package, nor through transformers' LLaVAs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TEXT = {"LlavaLlama": LlamaConfig, "LlavaMistral": MistralConfig, "LlavaQwen": Qwen2Config}


def best(size: tuple[int, int], sizes: list[list[int]]) -> tuple[int, int]:
    """Of the sizes (width, height) the one that keeps most of the picture, and among those the least empty."""

    def kept(pair: list[int]) -> tuple[int, int]:
        scale = min(pair[0] / size[0], pair[1] / size[1])
        seen = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return seen, seen - pair[0] * pair[1]

    width, height = max(sizes, key=kept)  # of equals the first
    return width, height


def tiles(picture: Image.Image, sizes: list[list[int]], side: int) -> list[Image.Image]:
    """The whole picture pressed into a square, then the tiles of the padded one, row by row."""
    width, height = best(picture.size, sizes)
    across, down = width / picture.width, height / picture.height
    if across < down:
        inner = (width, min(math.ceil(picture.height * across), height))
    else:
        inner = (min(math.ceil(picture.width * down), width), height)
    padded = Image.new("RGB", (width, height))
    padded.paste(picture.resize(inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    boxes = [(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side)]
    return [picture.resize((side, side)), *(padded.crop(box) for box in boxes)]


def unpadded(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features (width of a feature, rows, columns) less those of the empty borders."""
    rows, columns = grid.shape[1:]
    width, height = size
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        return grid[:, cut : rows - cut]
    cut = (columns - int(width * (rows / height))) // 2
    return grid[:, :, cut : columns - cut]


@dataclass
class Official:
    """A folder of the official layout, and the config of the tower that its id stands for."""

    folder: Path
    tower: dict[str, Any]

    def __post_init__(self) -> None:
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        for file in self.folder.glob("*.safetensors"):
            self.tensors |= load_file(file)
        kind = self.config["architectures"][0].removesuffix("ForCausalLM")
        self.llm = self._loaded(AutoModelForCausalLM.from_config(TEXT[kind](**self.config)), "model.", "lm_head.")
        self.eyes = self._tower()

    def _loaded(self, model: nn.Module, *beginnings: str) -> nn.Module:
        own = ("model.mm_projector", "model.vision_tower", "model.image_newline")
        state = {k: v.float() for k, v in self.tensors.items() if k.startswith(beginnings) and not k.startswith(own)}
        missing, strange = model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        assert (set(missing) - tied, strange) == (set(), [])
        if tied:
            model.tie_weights()
        return model.float().eval()

    def _tower(self) -> nn.Module:
        kind = self.tower["model_type"]
        model: nn.Module
        if kind == "siglip_vision_model":
            model = SiglipVisionModel(SiglipVisionConfig(**self.tower))
            inner = getattr(model, "vision_model", model)
            del inner.encoder.layers[-1:]
            for name in ("head",):
                if hasattr(inner, name):
                    setattr(inner, name, nn.Identity())
        else:
            model = CLIPVisionModel(CLIPVisionConfig(**self.tower))
        start = "model.vision_tower.vision_tower."
        flat = not any(key.startswith("vision_model.") for key in model.state_dict())
        state = {
            (k.removeprefix(start).removeprefix("vision_model.") if flat else k.removeprefix(start)): v.float()
            for k, v in self.tensors.items()
            if k.startswith(start)
        }
        missing, strange = model.load_state_dict(state, strict=False)
        assert (missing, strange) == ([], [])
        return model.float().eval()

    @property
    def side(self) -> int:
        return int(self.tower["image_size"])

    def sizes(self) -> list[list[int]]:
        found: list[list[int]] = self.config["image_grid_pinpoints"]
        assert isinstance(found, list)
        return found

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """(tiles, 3, side, side)."""
        half = self.tower["model_type"] == "siglip_vision_model"
        mean = [0.5] * 3 if half else [0.48145466, 0.4578275, 0.40821073]
        deviation = [0.5] * 3 if half else [0.26862954, 0.26130258, 0.27577711]
        seen = np.stack([np.asarray(tile) for tile in tiles(picture, self.sizes(), self.side)]).astype(np.float64)
        return torch.tensor(((seen / 255 - mean) / deviation).transpose(0, 3, 1, 2), dtype=torch.float32)

    def _output_of(self, block: nn.Module, picture: Image.Image) -> torch.Tensor:
        found: list[Any] = []
        hook = block.register_forward_hook(lambda module, inputs, output: found.append(output))
        self.eyes(self.pixels(picture))
        hook.remove()
        output: torch.Tensor = found[0][0] if isinstance(found[0], tuple) else found[0]
        return output

    @torch.inference_mode()
    def features(self, picture: Image.Image) -> torch.Tensor:
        """What the language model gets of a picture: (features, width)."""
        blocks = next(m for m in self.eyes.modules() if isinstance(m, nn.ModuleList))
        siglip = self.tower["model_type"] == "siglip_vision_model"
        # Hidden state 0 is what the first block reads. Of the cut tower the last one, before its norm.
        last = len(blocks) - 1 if siglip else len(blocks) + self.config["mm_vision_select_layer"]
        seen = self._output_of(blocks[last], picture)[:, 0 if siglip else 1 :]
        weights = {
            k: self.tensors[f"model.mm_projector.{k}"].float() for k in ("0.weight", "0.bias", "2.weight", "2.bias")
        }
        inner = nn.functional.gelu(nn.functional.linear(seen, weights["0.weight"], weights["0.bias"]))
        seen = nn.functional.linear(inner, weights["2.weight"], weights["2.bias"])
        newline = self.tensors["model.image_newline"].float()
        unit = math.isqrt(seen.shape[1])
        width, height = (length // self.side for length in best(picture.size, self.sizes()))
        grid = seen[1:].view(height, width, unit, unit, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        grid = unpadded(grid, picture.size)
        aspect = self.config["image_aspect_ratio"]
        if aspect.startswith("anyres_max_"):
            times = math.sqrt(grid.shape[1] * grid.shape[2] / (int(aspect.removeprefix("anyres_max_")) * unit**2))
            if times > 1.1:
                smaller = [int(grid.shape[1] // times), int(grid.shape[2] // times)]
                grid = nn.functional.interpolate(grid[None], smaller, mode="bilinear")[0]
        ends = newline[:, None, None].expand(*grid.shape[:2], 1)
        return torch.cat([seen[0], torch.cat([grid, ends], dim=2).flatten(1).T])

    @torch.inference_mode()
    def logits(self, picture: Image.Image, before: list[int], after: list[int]) -> torch.Tensor:
        """Of every position, a picture between two texts."""
        embed = self.llm.get_input_embeddings()  # type: ignore[operator]
        rows = [embed(torch.tensor(before)), self.features(picture), embed(torch.tensor(after))]
        found: torch.Tensor = self.llm(inputs_embeds=torch.cat(rows)[None]).logits[0]
        return found
