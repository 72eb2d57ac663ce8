"""What a card is about: the parts that an output holds, where they come from, and by which names commands call them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llava_convert.app.card.prompt import Prompt, prompt_of
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.hub_names import is_id
from llava_convert.engine.plan import Plan
from llava_convert.engine.shards import Shard
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.target import Target

_WHOLE = {
    "xtuner": "This is a LLaVA in xtuner's layout: a model that answers questions about pictures.",
    "official": "This is a LLaVA in the layout of the original code (haotian-liu/LLaVA): a model that answers "
    "questions about pictures.",
    "hf": "This is a LLaVA for transformers (`LlavaForConditionalGeneration`): a model that answers questions about "
    "pictures.",
    "gguf": "This is a LLaVA as GGUF, for llama.cpp and Ollama: a model that answers questions about pictures. It "
    "takes two files, a language model and an mmproj, which holds its eyes.",
}
_ALONE = {
    LLM: "This is the language model of a LLaVA, on its own: it reads text and sees no pictures.",
    VISION: "This is the vision tower of a LLaVA, on its own.",
    PROJECTOR: "This is the projector of a LLaVA, on its own: the layers between vision tower and language model.",
}
_PRETRAINED = (
    "This is the projector of a LLaVA in xtuner's layout: what a pretraining leaves, to be used with the language "
    "model and the vision tower that it was trained between."
)
_MMPROJ = "This is the mmproj of a LLaVA, on its own: its vision tower and projector as GGUF, for llama.cpp."


@dataclass(frozen=True)
class Facts:
    """What the texts of a card are made of."""

    plan: Plan
    target: Target
    model: Model
    name: str
    options: TargetOptions
    repo: str | None

    @property
    def layout(self) -> str:
        return self.plan.layout

    @cached_property
    def parts(self) -> frozenset[str]:
        """The parts of which the output holds something, be it an adapter."""
        found = {tensor.canonical.partition(".")[0] for tensor in self.plan.tensors}
        return frozenset(part for part in PARTS if part in found)

    @cached_property
    def alone(self) -> str | None:
        """The one part that the output was asked to hold, None where it is a LLaVA."""
        if self.layout == "gguf":
            return None if len(self.parts) > 2 else LLM if LLM in self.parts else VISION
        if len(self.parts) > 1 or (self.layout == "xtuner" and self.parts == {PROJECTOR}):
            return None  # of xtuner's layout the projector alone is what a pretraining leaves
        return next(iter(self.parts), None)

    @property
    def adapter(self) -> bool:
        """Whether an adapter is all that there is."""
        return all(".lora_" in t.canonical for t in self.plan.tensors)

    @property
    def whole(self) -> bool:
        return self.alone is None

    @property
    def sentence(self) -> str:
        if self.alone is None:
            return _PRETRAINED if self.parts == {PROJECTOR} else _WHOLE[self.layout]
        return _MMPROJ if (self.layout, self.alone) == ("gguf", VISION) else _ALONE[self.alone]

    @cached_property
    def title(self) -> str:
        return " ".join(self.name.split()) or "LLaVA"

    @property
    def folder(self) -> str:
        """The folder that commands find files in: the local one, or what a download of `repo` makes."""
        return self.name if self.repo is None else self.repo.rpartition("/")[2]

    @property
    def on_modelscope(self) -> bool:
        return self.repo is not None and self.repo.startswith("ms://")

    @property
    def reference(self) -> str:
        """What a library that knows the Hugging Face Hub is given: of what is on another, the folder."""
        return self.folder if self.repo is None or self.on_modelscope else self.repo

    def file(self, name: str) -> str:
        """A file of the output as a shell's word."""
        return shlex.quote(f"{self.folder}/{name}")

    @cached_property
    def made(self) -> Artefacts:
        return Artefacts(self.model, self.options)

    @cached_property
    def prompt(self) -> Prompt | None:
        """How the model wants to be asked, as far as that can be told without running a template."""
        return prompt_of(self.made)

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the output's tokenizer has one."""
        return self.made.templates.tokenizer is not None

    @property
    def base_ids(self) -> tuple[str, ...]:
        """The hub ids of what the output was trained from; of one part alone, that of this part."""
        one = self.parts & {LLM, VISION} if self.alone in (LLM, VISION) else {LLM, VISION}
        return tuple(dict.fromkeys(i for p in (LLM, VISION) if p in one and (i := self.base_id(p)) is not None))

    def base_id(self, part: str) -> str | None:
        """The hub id of a part's base model, where it is known and no guess."""
        name, guess = self.made.id_of(part)
        return name if guess is None and is_id(name) else None

    def config(self, file: str = "config.json") -> Mapping[str, Any]:
        """A JSON file of the output, {} where there is none."""
        found: dict[str, Any] = json.loads(self.plan.files.get(file, b"{}"))
        return found

    @property
    def llava_class(self) -> str:
        """The class of the original code that config.json names."""
        return str((self.config().get("architectures") or [""])[0])

    @cached_property
    def llm_shards(self) -> list[list[Shard]]:
        """The files of the language model: one list for each type that it is in."""
        sets: dict[str, list[Shard]] = {}
        for shard in self.plan.shards:
            if any(t.canonical.startswith(f"{LLM}.") for t in shard.tensors):
                stem, _, parts = shard.name.removesuffix(".gguf").rpartition("-of-")
                sets.setdefault(stem.rpartition("-")[0] if stem and parts.isdigit() else shard.name, []).append(shard)
        return list(sets.values())

    @cached_property
    def mmproj_shards(self) -> list[Shard]:
        return [s for s in self.plan.shards if all(not t.canonical.startswith(f"{LLM}.") for t in s.tensors)]
