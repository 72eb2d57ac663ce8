"""A checkpoint as its layout opened it: names, places and settings, but no weights.

Everything here is in canonical names: each part's tensors are called as the part's own class calls them in
transformers 4.x, after the part's prefix (`language_model.`, `vision_tower.`, `projector.`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.model.adapter import Adapter
from llava_convert.model.configs import has_head, without_last_block
from llava_convert.model.facts import ASPECT, LAYER, PINPOINTS, STRATEGY
from llava_convert.model.tables.facts import facts
from llava_convert.model.tables.pinpoints import in_pixels
from llava_convert.model.tables.quantization import Quantization
from llava_convert.model.training import TrainingConfig
from llava_convert.ops.base import Op
from llava_convert.storage.sidecars import Sidecars

LLM, VISION, PROJECTOR = "language_model", "vision_tower", "projector"
PARTS = (LLM, VISION, PROJECTOR)
IMAGE_NEWLINE = "image_newline"
AS_STORED = "as stored"

# What `--part` and messages call the parts.
PART_WORDS = {LLM: "llm", VISION: "visual-encoder", PROJECTOR: "projector"}
PART_NAMES = {LLM: "language model", VISION: "vision tower", PROJECTOR: "projector"}


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a tensor by name, and in how many groups their rows follow each other."""

    names: tuple[str, ...]
    groups: int


@dataclass(frozen=True)
class Part:
    """One part of a LLaVA, as far as the checkpoint holds it.

    `weights` are whole tensors; `adapter` is a LoRA on top of a base. What neither gives comes from the base
    model, which the source names by `base` (a folder or a hub id) when it can. `files` are the small ones beside
    the weights (tokenizer, processor), when the layout has them. `origin` is which checkpoint the weights are of.

    `merge` are adapters to put on top of the whole weights, in order, whatever the target.

    By canonical name, `ops` make the canonical tensor of a stored one which the layout keeps in another form, and
    `synthetic` holds tensors which the layout never has and nothing reads: they stand in where no base has them. A
    tensor that the layout keeps in parts is in `joins`; its parts are among the weights, by names of their own.
    """

    weights: Mapping[str, StoredTensor] = field(default_factory=dict)
    adapter: Adapter | None = None
    base: str | None = None
    config: Mapping[str, Any] | None = None
    files: Sidecars | None = None
    origin: str = "checkpoint"
    ops: Mapping[str, tuple[Op, ...]] = field(default_factory=dict)
    merge: tuple[Adapter, ...] = ()
    synthetic: Mapping[str, tuple[StoredTensor, tuple[Op, ...]]] = field(default_factory=dict)
    joins: Mapping[str, Parts] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The canonical names of the tensors that are held whole, or in all their parts."""
        parts = {name for parts in self.joins.values() for name in parts.names}
        return (self.weights.keys() - parts) | self.joins.keys()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Every adapter of the part, in the order in which they are merged."""
        return self.merge if self.adapter is None else (self.adapter, *self.merge)

    @property
    def state(self) -> str:
        """What the checkpoint holds of the part: "full", "lora" or "absent"."""
        if self.adapter is not None:
            return "lora"
        return "full" if self.weights else "absent"


# Fields of Settings, and the facts that they hold.
_FACTS = {"select_layer": LAYER, "select_strategy": STRATEGY, "image_aspect_ratio": ASPECT}


@dataclass(frozen=True)
class Settings:
    """How the parts work together.

    `select_layer` is the hidden state of the tower that the projector reads (-2 is the last but one), and
    `select_strategy` says whether the class token goes along ("full") or not ("default"). `said` are the other facts of
    mappings/facts/llava.toml, by name, as far as the source states them.
    """

    select_layer: int = -2
    select_strategy: str = "default"
    image_aspect_ratio: str = "pad"
    prompt_template: str | Mapping[str, Any] | None = None
    max_position_embeddings: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {
            "feature layer": (type(self.select_layer) is int, self.select_layer),
            "feature selection": (self.select_strategy in ("default", "full"), self.select_strategy),
            "image_aspect_ratio": (isinstance(self.image_aspect_ratio, str), self.image_aspect_ratio),
        }
        for what, (right, value) in wrong.items():
            if not right:
                raise InputError(f"the {what} of the source cannot be {str(value)[:60]!r}")

    @classmethod
    def of(cls, said: Mapping[str, Any], **more: Any) -> Settings:
        """The settings of facts by name."""
        named = {field: said[fact] for field, fact in _FACTS.items() if fact in said}
        rest = {fact: value for fact, value in said.items() if fact not in _FACTS.values()}
        return cls(**{**named, **more}, said=rest)

    @property
    def facts(self) -> dict[str, Any]:
        """Every fact by name, those that have a field of their own among them."""
        return {**{fact: getattr(self, field) for field, fact in _FACTS.items()}, **self.said}

    def record(self) -> dict[str, Any]:
        """What conversion.json keeps, since not every layout has a place for it."""
        found: dict[str, Any] = {field: getattr(self, field) for field in _FACTS}
        more = {name: value for name, value in sorted(self.said.items()) if value != facts()[name].default}
        return {**found, "facts": more} if more else found

    @classmethod
    def recorded(cls, record: Mapping[str, Any] | None) -> Settings:
        """The settings that a conversion.json tells, else the defaults."""
        told = (record or {}).get("settings")
        if not isinstance(told, dict):
            return cls()
        said = told.get("facts")
        more = {k: v for k, v in said.items() if k in facts()} if isinstance(said, dict) else {}
        return cls(**{k: v for k, v in told.items() if k in _FACTS}, said=more)


@dataclass(frozen=True)
class Dropped:
    """A tensor left behind, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Extra:
    """Tensors beside the parts that no table has; `problem` says so in a sentence."""

    names: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class Layer:
    """A checkpoint that another was laid over, or that was laid over it.

    `role` is what a record calls it (base, adapter), `asked` how it was named; `files` are its weights, within `root`.
    """

    role: str
    asked: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A source that was opened by its headers.

    `default_part` is what `--part all` means: "all", or the one part of a source that is no LLaVA. `whole` is false
    where the layout itself does not tell a model from a part of one. `defects` are what a reader of this layout chokes
    on, though nothing here needs it. `facts` are what else the source says of itself. `beside` are the small files in
    `root`. `unknown_keys` are those of its own config that no table has, with their values; `stated` is what decides in
    files that are no JSON, as it stands.

    `every_feature` are the types of towers of which the source's code hands on all features of the last layer but one,
    whatever its config says, and which it cuts behind that layer. `as_written` is false where a conversion to its own
    layout would change how it is kept: what processes saved in shares, torch's files, other names. `publish_dtype` is
    the dtype to publish what a trainer left (torch's name; AS_STORED: that of the language model, if it has 16 bits),
    None for what keeps its own. `quantization` is how another program packed weights, None where none are packed;
    `extra` are tensors of no part.

    `base` names the model that it was trained from, where that may be a whole LLaVA. It is `bare` where it has nothing
    but adapters: the files beside them are then the base's. It is `settled` where it says how the parts work together.
    `layers` are the others that it is made of by now (`model.layers`); `record` is that of the layout `record_of`.
    """

    layout: str
    path: Path
    root: Path
    files: tuple[Path, ...]
    beside: Sidecars
    parts: Mapping[str, Part]
    settings: Settings = Settings()
    image_newline: StoredTensor | None = None
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    training: TrainingConfig | None = None
    stubs: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None
    default_part: str = "all"
    whole: bool = True
    defects: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    unknown_keys: Mapping[str, Any] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    every_feature: tuple[str, ...] = ()
    publish_dtype: str | None = None
    as_written: bool = True
    quantization: Quantization | None = None
    extra: Extra | None = None
    base: str | None = None
    bare: bool = False
    settled: bool = True
    layers: tuple[Layer, ...] = ()
    record_of: str | None = None

    @property
    def vocabulary_layout(self) -> str:
        """The layout that `record` tells of, which rows and tokens may have been added for."""
        return self.record_of or self.layout

    def with_tower(self, config: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
        """The checkpoint once the config of its tower is known, and the config of the tower that it uses.

        Of the towers in `every_feature` the source's code cuts the last block and the head off before it trains or
        loads: where the checkpoint still has that block, it is kept, and the layer before it is the one that is read.
        """
        settings, found = self.settings, dict(config)
        pairs = settings.said.get(PINPOINTS)
        if pairs is not None:
            sizes = in_pixels(pairs, int(config["image_size"]))
            settings = replace(settings, said={**settings.said, PINPOINTS: sizes})
        if config.get("model_type") in self.every_feature:
            last = f".layers.{int(config['num_hidden_layers']) - 1}."
            has_last = any(last in name for name in self.parts[VISION].names)
            layer = -2 if has_last and has_head(config) else -1
            if not has_last and (has_head(config) or self.parts[VISION].names):
                found = without_last_block(config)
            settings = replace(settings, select_layer=layer, select_strategy="full")
        return replace(self, settings=settings), found

    def with_part(self, name: str, part: Part) -> Checkpoint:
        return replace(self, parts={**self.parts, name: part})

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor that the checkpoint holds, adapters included, by canonical name."""
        found: dict[str, StoredTensor] = {}
        for part in self.parts.values():
            found.update(part.weights)
            for adapter in part.adapters:
                found.update(adapter.tensors)
        if self.image_newline is not None:
            found[IMAGE_NEWLINE] = self.image_newline
        return found
