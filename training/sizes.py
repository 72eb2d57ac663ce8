"""Parameters and memory of a recipe's model, by arithmetic: nothing is loaded, no network is asked.

For the base models that the recipes name their shapes are written down here; of others the config says them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .recipe import Lora, ModelRecipe

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
NF4 = 0.55  # bytes of a weight, its scales included
TRAINED = 12  # bytes of a trained weight beside itself: a gradient and AdamW's two moments, float32 each


@dataclass(frozen=True)
class Shape:
    """A Llama (`vocabulary` > 0) or a CLIP or SigLIP tower; Phi-3 has Llama's shape, with fused matrices."""

    hidden: int
    intermediate: int
    layers: int
    kv: int  # width of keys, and of values
    vocabulary: int = 0
    tied: bool = False
    fused: bool = False
    positions: int = 0
    patch: int = 0
    class_token: bool = True

    @classmethod
    def of_config(cls, config: Any) -> Shape | None:
        """The shape of a transformers config; None for an architecture that is not one of these."""
        kind, hidden, layers = config.model_type, config.hidden_size, config.num_hidden_layers
        if kind in ("llama", "phi3"):
            kv = hidden // config.num_attention_heads * config.num_key_value_heads
            wide, words = config.intermediate_size, config.vocab_size
            return cls(hidden, wide, layers, kv, words, config.tie_word_embeddings, kind == "phi3")
        if kind == "clip_vision_model":
            positions = (config.image_size // config.patch_size) ** 2 + 1
            return cls(hidden, config.intermediate_size, layers, hidden, positions=positions, patch=config.patch_size)
        return None

    def linears(self) -> Iterator[tuple[int, int]]:
        """Width in and out of every linear layer but the head: those that a LoRA without `target_modules` is on."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        if not self.vocabulary:
            layer = [(h, h)] * 4 + [(h, i), (i, h)]
        elif self.fused:
            layer = [(h, h + 2 * kv), (h, h), (h, 2 * i), (i, h)]
        else:
            layer = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
        for _ in range(self.layers):
            yield from layer

    @property
    def parameters(self) -> int:
        weights = sum(wide * out for wide, out in self.linears())
        h = self.hidden
        if self.vocabulary:
            return weights + self.vocabulary * h * (1 if self.tied else 2) + h * (2 * self.layers + 1)
        biases = sum(out for _, out in self.linears())
        embeddings = 3 * self.patch**2 * h + self.positions * h + h
        return weights + biases + embeddings + 4 * h * self.layers + 4 * h

    def lora(self, lora: Lora) -> int:
        """Parameters of an adapter on every linear layer."""
        return sum(lora.r * (wide + out) for wide, out in self.linears())


KNOWN = {
    "meta-llama/Meta-Llama-3-8B-Instruct": Shape(4096, 14336, 32, 1024, 128256),
    "lmsys/vicuna-7b-v1.5": Shape(4096, 11008, 32, 4096, 32000),
    "lmsys/vicuna-13b-v1.5": Shape(5120, 13824, 40, 5120, 32000),
    "microsoft/Phi-3-mini-4k-instruct": Shape(3072, 8192, 32, 3072, 32064, fused=True),
    "openai/clip-vit-large-patch14-336": Shape(1024, 4096, 24, 1024, positions=577, patch=14),
}


@dataclass(frozen=True)
class Sizes:
    """By part, how many parameters it has and how many are trained; bytes of the weights, and of what training adds."""

    parameters: Mapping[str, tuple[int, int]]
    weights: int
    optimizer: int

    @property
    def memory(self) -> str:
        return (
            f"weights {self.weights / 1e9:.1f} GB, gradients and optimiser {self.optimizer / 1e9:.1f} GB, "
            "and the activations"
        )


def sizes_of(recipe: ModelRecipe, shapes: Mapping[str, Shape]) -> Sizes:
    """The sizes of a model whose two base models have these shapes, by name."""
    llm, tower = shapes[recipe.llm], shapes[recipe.visual_encoder]
    counts = {
        "llm": _counts(llm, recipe.llm_lora, frozen=recipe.freeze_llm),
        "visual_encoder": _counts(tower, recipe.visual_encoder_lora, frozen=recipe.freeze_visual_encoder),
    }
    h = llm.hidden
    projector = (tower.hidden + 1) * h + (recipe.projector_depth - 1) * (h + 1) * h
    counts["projector"] = (projector, projector)
    return weighed(recipe, counts)


def weighed(recipe: ModelRecipe, counts: Mapping[str, tuple[int, int]]) -> Sizes:
    """What parameters take in memory, by part all of them and those that are trained."""
    each = {"llm": NF4 if recipe.quantization else BYTES[recipe.llm_dtype]}
    weights = sum(int(every * each.get(part, 4.0)) for part, (every, _) in counts.items())
    return Sizes(counts, weights, TRAINED * sum(trained for _, trained in counts.values()))


def _counts(shape: Shape, lora: Lora | None, *, frozen: bool) -> tuple[int, int]:
    own = shape.parameters
    if lora is not None:
        return own + shape.lora(lora), shape.lora(lora)
    return own, 0 if frozen else own
