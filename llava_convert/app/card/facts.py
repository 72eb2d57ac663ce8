"""What a card is about: the parts that an output holds, where they come from, and by which names commands call them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from llava_convert.app.card.prompt import Prompt, prompt_of
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.hub_names import is_id
from llava_convert.core.values import dataclass
from llava_convert.engine.plan import Plan
from llava_convert.engine.shards import Shard
from llava_convert.layouts.info import LAYOUTS, TARGETS, Card, LayoutInfo, TargetInfo
from llava_convert.model.checkpoint import LLM, PARTS, PROJECTOR, VISION
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.target import Target

_MARKUP = re.compile(r"[\\`*\[\]<>&]")


@dataclass(frozen=True)
class Facts:
    """What the texts of a card are made of.

    `name` is the output's, `repo` the hub id that it is going to have (ms://… on ModelScope); `options` are those that
    the target was made with.
    """

    plan: Plan
    target: Target
    model: Model
    name: str
    options: TargetOptions
    repo: str | None

    @property
    def kind(self) -> TargetInfo:
        """What is known of the output's layout."""
        return TARGETS[self.plan.layout]

    @property
    def source(self) -> LayoutInfo:
        """What is known of the source's layout."""
        return LAYOUTS[self.model.checkpoint.layout]

    @property
    def card(self) -> Card:
        """What is said of such an output. Raises ValueError where the layout's entry has nothing of it."""
        kind = self.kind
        cards = {ALL: kind.whole, LLM: kind.language_model, VISION: kind.vision_tower, PROJECTOR: kind.projector}
        found = cards[self.part]
        if found is None:
            raise ValueError(f"layouts/info.py has no card for the {self.part} of the {self.plan.layout} layout")
        return found

    @cached_property
    def parts(self) -> frozenset[str]:
        """The parts of which the output holds something, be it an adapter."""
        found = {tensor.canonical.partition(".")[0] for tensor in self.plan.tensors}
        return frozenset(part for part in PARTS if part in found)

    @cached_property
    def part(self) -> str:
        """The part that the output was asked to hold, or all: then, too, there may be no more than one."""
        asked = self.options.part
        return next(iter(self.parts)) if asked == ALL and len(self.parts) == 1 else asked

    @property
    def alone(self) -> str | None:
        """The one part that the output is of, None where it is a LLaVA."""
        pretrained = self.part == PROJECTOR and LAYOUTS[self.plan.layout].leaves_out_frozen
        return None if self.part == ALL or pretrained else self.part

    @property
    def adapter(self) -> bool:
        """Whether an adapter is all that there is."""
        return all(".lora_" in t.canonical for t in self.plan.tensors)

    @property
    def whole(self) -> bool:
        return self.alone is None

    @cached_property
    def title(self) -> str:
        """The output's name as Markdown shows it: what would be markup in it, or HTML, is escaped."""
        return _MARKUP.sub(r"\\\g<0>", " ".join(self.name.split())) or "LLaVA"

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

    def place_of(self, part: str) -> str | None:
        """The folder within the output that a part's weights lie in, None where the output has none of them."""
        shards = (shard.name for shard in self.plan.shards for t in shard.tensors if t.canonical.startswith(f"{part}."))
        found = next(shards, None)
        return None if found is None else found.rpartition("/")[0]

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
