"""A LLaVA put together from a `.pth` and its base models by plain torch code, which shares nothing with the package.

Parts are built by transformers' own text and vision classes; the rest (reading the pickle, merging LoRA, the projector,
which layer it reads, where the features go) is written out here.
"""

from __future__ import annotations

import pickle
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

IMAGE = "<image>"
LORA_SCALE = 16 / 8  # lora_alpha / r, the same in every checkpoint here that goes through this module


class _Inert:
    """Stands for every pickled object that is not a tensor."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        real = module.startswith("torch") or (module, name) == ("collections", "OrderedDict")
        return super().find_class(module, name) if real else _Inert


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of an mmengine checkpoint, under xtuner's names."""
    stub = types.ModuleType("stub")
    stub.Unpickler = _Unpickler  # type: ignore[attr-defined]
    loaded = torch.load(path, map_location="cpu", weights_only=False, pickle_module=stub)
    return dict(loaded["state_dict"])


def _apply(model: nn.Module, trained: dict[str, torch.Tensor], prefix: str) -> None:
    """Overwrite and merge into `model`, in float32, what training left of it."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    mine = {key.removeprefix(prefix): value for key, value in trained.items() if key.startswith(prefix)}
    with torch.no_grad():
        for key, value in mine.items():
            if key.endswith(".lora_A.default.weight"):
                module = key.removesuffix(".lora_A.default.weight")
                delta = mine[f"{module}.lora_B.default.weight"].float() @ value.float()
                weights[_plain(module) + ".weight"].add_(delta * LORA_SCALE)
            elif ".lora_B." not in key:
                weights[_plain(key)].copy_(value.float())


def _plain(name: str) -> str:
    """A module's name without peft's prefix, and without the one that transformers 5.6 took from its vision tower."""
    return name.removeprefix("base_model.model.").removeprefix("vision_model.")


def pieces(bases: Path, prompt: str) -> list[list[int]]:
    """Token ids before and after each `<image>`, by the base model's own tokenizer, with one BOS in front."""
    tokenizer = AutoTokenizer.from_pretrained(bases / "llm")
    first, *rest = (tokenizer.encode(piece, add_special_tokens=False) for piece in prompt.split(IMAGE))
    return [[tokenizer.bos_token_id, *first], *rest]


@dataclass
class ByHand:
    """The three parts in float32, rounded to `dtype` first where that is asked for."""

    llm: LlamaForCausalLM
    tower: CLIPVisionModel
    projector: nn.Sequential
    bases: Path
    select_layer: int = -2

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the projector makes of the output of a layer of the tower, its class token left out."""
        outputs: list[torch.Tensor] = []
        layer = self.tower.encoder.layers[self.select_layer]
        hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(_first(output)))
        self.tower(pixel_values=pixels)
        hook.remove()
        features: torch.Tensor = self.projector(outputs[0][:, 1:])
        return features

    @torch.inference_mode()
    def logits(self, prompt: str, pixels: torch.Tensor) -> torch.Tensor:
        """Logits at every position of a prompt with one picture: (length with features, vocabulary)."""
        before, after = pieces(self.bases, prompt)
        embed = self.llm.get_input_embeddings()
        rows = [embed(torch.tensor(before)), self.features(pixels)[0], embed(torch.tensor(after))]
        logits: torch.Tensor = self.llm(inputs_embeds=torch.cat(rows)[None]).logits[0]
        return logits


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def assemble(pth: Path, bases: Path, *, select_layer: int = -2, dtype: torch.dtype = torch.float32) -> ByHand:
    """Build the model that a checkpoint means, from it and from the folder that holds `llm/` and `vit/`."""
    trained = read_pth(pth)
    llm = LlamaForCausalLM.from_pretrained(bases / "llm", dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(bases / "vit", dtype=torch.float32)
    _apply(llm, trained, "llm.")
    _apply(tower, trained, "visual_encoder.")
    weights = {key.removeprefix("projector.model."): v for key, v in trained.items() if key.startswith("projector.")}
    layers: list[nn.Module] = []
    for key in sorted(key for key in weights if key.endswith(".weight")):
        hidden, features = weights[key].shape
        layers += [nn.GELU(), nn.Linear(features, hidden)]
    projector = nn.Sequential(*layers[1:])
    projector.load_state_dict({key: value.float() for key, value in weights.items()})
    for part in (llm, tower, projector):
        part.eval()
        for parameter in part.parameters():  # and not the buffers: files hold no inv_freq
            parameter.data = parameter.data.to(dtype).float()
    return ByHand(llm, tower, projector, bases, select_layer)
