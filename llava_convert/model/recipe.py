"""A model made whole: every tensor with where it comes from and what happens to it on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llava_convert.core.tensors import StoredTensor
from llava_convert.model.bases import Base
from llava_convert.model.checkpoint import LLM, VISION, Checkpoint, Dropped
from llava_convert.model.configs import family
from llava_convert.ops.base import Op
from llava_convert.storage.sidecars import Sidecars


@dataclass(frozen=True)
class Bases:
    """What the user says of the base models; overrides what the source names.

    `cache`: what a hub holds is downloaded to its client's cache, instead of being read in place.
    """

    llm: str | None = None
    visual_encoder: str | None = None
    llm_id: str | None = None
    visual_encoder_id: str | None = None
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
    cache: bool = False

    def asked(self, part: str) -> str | None:
        return {LLM: self.llm, VISION: self.visual_encoder}.get(part)

    def asked_id(self, part: str) -> str | None:
        return {LLM: self.llm_id, VISION: self.visual_encoder_id}.get(part)


@dataclass(frozen=True)
class Recipe:
    """One canonical tensor: the stored tensor it starts from, and the ops on the way."""

    tensor: StoredTensor
    ops: tuple[Op, ...] = ()
    origin: str = "checkpoint"

    def then(self, *ops: Op) -> Recipe:
        """The recipe with further ops; one that only undoes the op before it goes, and takes that op with it."""
        found = self
        for op in ops:
            before = replace(found, ops=found.ops[:-1])
            undone = bool(found.ops) and op == found.ops[-1].inverse(before.dtype, before.shape)
            found = before if undone else replace(found, ops=(*found.ops, op))
        return found

    @property
    def dtype(self) -> str:
        return self._result()[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._result()[1]

    def _result(self) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self.tensor.dtype, self.tensor.shape
        for op in self.ops:
            dtype, shape = op.result(dtype, shape)
        return dtype, shape


@dataclass(frozen=True)
class Model:
    """A checkpoint made whole, as far as a target asked for it.

    `recipes` holds the merged weights of each wanted part in module order; `configs` and `bases` are by part. `tied`
    says that the language model's head shares the embedding's weights. `added` is what an earlier conversion recorded
    as added to the vocabulary, while it has been taken off again.
    """

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    configs: Mapping[str, dict[str, Any]]
    bases: Mapping[str, Base]
    tied: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    added: Mapping[str, Any] | None = None

    @property
    def embedding(self) -> str:
        """The canonical name of the language model's embedding."""
        return family(LLM, self.configs[LLM]).embedding

    @property
    def head(self) -> str:
        """The canonical name of the language model's head."""
        return family(LLM, self.configs[LLM]).head

    def part(self, name: str) -> dict[str, Recipe]:
        """The recipes of one part, by canonical name."""
        return {k: v for k, v in self.recipes.items() if k.startswith(f"{name}.")}

    def files(self, part: str) -> Sidecars | None:
        """The files beside the part's weights: tokenizer, processor, generation config."""
        own = self.checkpoint.parts[part].files
        if own is not None:
            return own
        return self.bases[part].files if part in self.bases else None
