"""A recipe: everything that a training run is, as a TOML file read into frozen values.

`[model]`, `[data]` and `[train]` are the classes below, field by field. A file with `[[stage]]` tables is several runs
one after the other: each stage overrides what stands above it, and starts from the last checkpoint of the one before.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_convert.assets.prompts import prompt_templates
from llava_convert.core.errors import ConvertError, InputError, UsageError
from llava_convert.core.resources import data_dir

from .formats import FORMATS
from .hints import nearest_key, nearest_recipe

DTYPES = ("fp32", "bf16", "fp16")
PARTS = ("llm", "visual_encoder", "projector")  # in the module's order
DATA_CHECK = "llava-convert data check RECIPE"  # what tells of missing data; `hints_name` puts the recipe in
ON_BAD_IMAGE = ("fail", "skip")
SAMPLERS = ("length_grouped", "shuffle")
ATTENTION = ("", "eager", "sdpa", "flash_attention_2", "flex_attention")
TRACKERS = ("tensorboard", "wandb", "trackio")
PLAIN_TEMPLATE = "plain"  # of LLaVA's first stage; xtuner has no such one


@dataclass(frozen=True)
class Lora:
    """peft's LoraConfig. Without `target_modules`: every linear layer of the part but the head, as xtuner does."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    bias: str = "none"
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRecipe:
    """The parts, and what is trained of each.

    `pretrained` is a stage 1: its work_dir (the newest checkpoint there), `.pth`, xtuner folder or `mm_projector.bin`.
    `attention` is transformers' `attn_implementation` of the language model; empty: what transformers chooses.
    """

    llm: str
    visual_encoder: str
    llm_dtype: str = "fp32"
    projector_depth: int = 2
    select_layer: int = -2
    freeze_llm: bool = True
    freeze_visual_encoder: bool = True
    llm_lora: Lora | None = None
    visual_encoder_lora: Lora | None = None
    quantization: str = ""
    pretrained: str = ""
    gradient_checkpointing: bool = True
    attention: str = ""


@dataclass(frozen=True)
class DataSet:
    """One file (json or jsonl) of a format (FORMATS) and the folder that its pictures are named in.

    Of more than `max_rows` conversations so many are drawn, by `train.seed`; 0 takes all.
    """

    name: str
    file: str
    images: str = ""
    repeats: int = 1
    format: str = "conversations"
    max_rows: int = 0


@dataclass(frozen=True)
class DataRecipe:
    """What is trained on. `max_length` counts text and picture tokens together; the picture's share is taken off.

    `sampler`: batches of one modality and of like lengths, or a plain shuffle. Without `pad_image_to_square` a picture
    is resized and its middle is cut out.
    """

    sets: tuple[DataSet, ...]
    root: str = "."
    prompt_template: str = "llama3_chat"
    max_length: int = 2048
    pad_image_to_square: bool = True
    sampler: str = "length_grouped"
    on_bad_image: str = "fail"
    workers: int = 4


@dataclass(frozen=True)
class TrainRecipe:
    """The optimiser and its schedule. An iteration is one micro-batch, as xtuner counts; `accumulate` make a step.

    `lr_…` is the rate of one part, where it is not `lr`. `mmengine_warmup`: a warm-up of one iteration leaves the rate
    at `warmup_start` for the whole run, as mmengine has it; without, such a warm-up is none. `keep`: -1 keeps all.
    """

    batch_size: int = 1
    accumulate: int = 1
    epochs: float = 1
    max_iters: int | None = None
    lr: float = 1e-3
    lr_llm: float | None = None
    lr_visual_encoder: float | None = None
    lr_projector: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 1.0
    warmup_ratio: float = 0.03
    warmup_start: float = 1e-5
    mmengine_warmup: bool = False
    save_steps: int = 500
    keep: int = 2
    seed: int = 1024
    dtype: str = "bf16"
    log_every: int = 10
    trackers: tuple[str, ...] = ()

    def rate_of(self, part: str) -> float:
        """The peak of the learning rate of `llm`, `visual_encoder` or `projector`."""
        own: float | None = getattr(self, f"lr_{part}")
        return self.lr if own is None else own


@dataclass(frozen=True)
class EvalRecipe:
    """The loss on conversations that are not trained on, and sample answers, `every` so many iterations; 0: none.

    They are those of `sets` ([[eval.set]]), or else `rows` of the training data, which are then held out of it. The
    first `answers` questions of them are answered, in `max_tokens` at most.
    """

    every: int = 0
    sets: tuple[DataSet, ...] = ()
    rows: int = 64
    answers: int = 4
    max_tokens: int = 48


@dataclass(frozen=True)
class BuildRecipe:
    """Models and data that the run makes for itself before it starts; `kind` is a module of this folder."""

    kind: str
    folder: str


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    build: BuildRecipe | None = None
    stage: str = ""

    def __post_init__(self) -> None:
        model, data, train = self.model, self.data, self.train
        sets = (*data.sets, *self.eval.sets)
        rates = (train.lr, *map(train.rate_of, PARTS))
        loras = [lora for lora in (model.llm_lora, model.visual_encoder_lora) if lora is not None]
        templates = (*prompt_templates(), PLAIN_TEMPLATE)
        wrong = {
            "model.llm_dtype": (model.llm_dtype in DTYPES, _one_of(DTYPES)),
            "model.quantization": (model.quantization in ("", "nf4"), '"" or "nf4"'),
            "model.projector_depth": (model.projector_depth > 0, "at least 1"),
            "model.attention": (model.attention in ATTENTION, _one_of(ATTENTION[1:])),
            "the r of a LoRA": (all(lora.r > 0 for lora in loras), "at least 1"),
            "the dropout of a LoRA": (all(0 <= lora.dropout < 1 for lora in loras), "from 0 to below 1"),
            "data.prompt_template": (
                data.prompt_template in templates,
                f"{_one_of(templates)}; nearest: {nearest_key([data.prompt_template], templates)}",
            ),
            "data.max_length": (data.max_length > 0, "at least 1"),
            "data.sampler": (data.sampler in SAMPLERS, _one_of(SAMPLERS)),
            "data.on_bad_image": (data.on_bad_image in ON_BAD_IMAGE, _one_of(ON_BAD_IMAGE)),
            "data.workers": (data.workers >= 0, "at least 0"),
            "data.set": (len(data.sets) > 0, "at least one table [[data.set]]"),
            "data.set.repeats": (all(one.repeats > 0 for one in sets), "at least 1"),
            "data.set.format": (all(one.format in FORMATS for one in sets), _one_of(FORMATS)),
            "data.set.max_rows": (all(one.max_rows >= 0 for one in sets), "at least 0"),
            "train.dtype": (train.dtype in DTYPES, _one_of(DTYPES)),
            "train.batch_size": (train.batch_size > 0, "at least 1"),
            "train.accumulate": (train.accumulate > 0, "at least 1"),
            "train.epochs": (0 < train.epochs < math.inf, "above 0"),
            "train.max_iters": (train.max_iters is None or train.max_iters > 0, "at least 1"),
            "train.lr": (all(0 < rate < math.inf for rate in rates), "above 0"),
            "train.betas": (all(0 <= beta < 1 for beta in train.betas), "from 0 to below 1"),
            "train.eps": (train.eps > 0, "above 0"),
            "train.weight_decay": (0 <= train.weight_decay < math.inf, "at least 0"),
            "train.max_norm": (train.max_norm > 0, "above 0"),
            "train.warmup_ratio": (0 <= train.warmup_ratio < 1, "from 0 to below 1"),
            "train.warmup_start": (0 < train.warmup_start <= 1, "above 0, and 1 at most"),
            "train.save_steps": (train.save_steps > 0, "at least 1"),
            "train.keep": (train.keep > 0 or train.keep == -1, "at least 1, or -1 to keep all"),
            "train.log_every": (train.log_every > 0, "at least 1"),
            "train.trackers": (set(train.trackers) <= set(TRACKERS), f"of {', '.join(TRACKERS)}"),
            "eval.every": (self.eval.every >= 0, "at least 0"),
            "eval.rows": (self.eval.rows > 0, "at least 1"),
            "eval.answers": (self.eval.answers >= 0, "at least 0"),
            "eval.max_tokens": (self.eval.max_tokens > 0, "at least 1"),
        }
        for key, (right, expected) in wrong.items():
            if not right:
                raise UsageError(f"recipe {self.name}: {key} must be {expected}")


def _one_of(words: Iterable[str]) -> str:
    return f"one of {', '.join(words)}"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in (data_dir("training") / "recipes").glob("*.toml"))


@contextmanager
def hints_name(source: str, overrides: Iterable[str] = ()) -> Iterator[None]:
    """Within it, a hint to check the data names the recipe as the user does, with what is changed in it."""
    try:
        yield
    except ConvertError as problem:
        changes = [word for text in overrides for word in ("--set", text)]
        command = shlex.join([*DATA_CHECK.split()[:-1], source, *changes])
        problem.reword(lambda text: text.replace(DATA_CHECK, command))
        raise


def load_recipe(source: str, overrides: Iterable[str] = ()) -> tuple[Recipe, ...]:
    """The stages of a recipe: a file, or the name of one that comes with the package.

    `overrides` are `key=value` as on the command line: `train.lr=1e-4`, or `STAGE.train.lr=1e-4` for one stage; the
    table may be left out where only one has that key. Raises UsageError for keys and values that no recipe has,
    InputError for a file that cannot be read.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = data_dir("training") / "recipes" / f"{source}.toml"
    if not path.is_file():
        if source.endswith(".toml"):
            raise InputError(f"{source}: no such file", hint="`llava-convert train --list` shows what there is")
        raise InputError(
            f"there is no recipe {source}",
            hint=f"nearest: {nearest_recipe(source, recipe_names())}; `llava-convert train --list` shows all",
        )
    try:
        top = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: not a recipe: {problem}") from None
    stages = top.pop("stage") if isinstance(top.get("stage"), list) else [{}]
    top.setdefault("name", path.stem)
    if len(stages) > 1 and not all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in stages):
        raise InputError(f"{path}: each [[stage]] needs a name")
    found = []
    words = [_override(text) for text in overrides]
    names = [s.get("name", "") for s in stages]
    for stage in stages:
        table = _merged(top, {k: v for k, v in stage.items() if k != "name"})
        if stage.get("name"):
            table["name"], table["stage"] = f"{top['name']}-{stage['name']}", stage["name"]
        for keys, value in words:
            if keys[0] in names:
                if keys[0] != stage.get("name"):
                    continue
                keys = keys[1:]
            keys = _full(keys)
            if keys[0] not in {f.name for f in dataclasses.fields(Recipe)}:
                near = nearest_key(keys, [*_keys(), *(f"{name}.{key}" for name in names if name for key in _keys())])
                raise UsageError(f"--set {'.'.join(keys)}: a recipe has no such key", hint=f"nearest: {near}")
            _put(table, keys, value)
        for part in ("data", "eval"):
            if isinstance(table.get(part), dict) and "set" in table[part]:
                table[part]["sets"] = table[part].pop("set")
        found.append(typing.cast(Recipe, _build(Recipe, table, f"recipe {table['name']}", "")))
    return tuple(found)


def _override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}: it is key=value", hint="for instance --set train.lr=1e-4")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word: a path, a name
    return key.split("."), parsed


def _full(keys: list[str]) -> list[str]:
    """`lr` → `train.lr`, where only one table has that key."""
    if len(keys) == 1 and keys[0] != "name":
        homes = [t for t, cls in _TABLES.items() if keys[0] in {f.name for f in dataclasses.fields(cls)}]
        if len(homes) == 1:
            return [homes[0], keys[0]]
    return keys


_TABLES: dict[str, Any] = {"model": ModelRecipe, "data": DataRecipe, "train": TrainRecipe, "eval": EvalRecipe}


def _keys() -> list[str]:
    """Every key that can be set, with its table."""
    return [f"{table}.{f.name}" for table, cls in _TABLES.items() for f in dataclasses.fields(cls)]


def _put(table: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(table.get(key), dict):
            table[key] = {}
        table = table[key]
    table[keys[-1]] = value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge, all else is replaced; neither is changed."""
    found = {k: _merged(v, {}) if isinstance(v, dict) else v for k, v in base.items()}
    for key, value in over.items():
        old = found.get(key)
        found[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _build(cls: Any, table: Any, where: str, at: str) -> Any:
    """A dataclass from a table, every key and type checked."""
    if not isinstance(table, dict):
        raise UsageError(f"{where}: {at or 'the recipe'} must be a table")
    kinds = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            near = nearest_key([*at.split(".")[:-1], key], [*(f"{at}{name}" for name in known), *_keys()])
            raise UsageError(f"{where}: there is no {at}{key}", hint=f"nearest: {near}")
    missing = [
        name
        for name, f in known.items()
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(
            f"{where}: {at}{missing[0].removesuffix('s') if missing[0] == 'sets' else missing[0]} is missing"
        )
    return cls(**{key: _value(kinds[key], value, where, f"{at}{key}") for key, value in table.items()})


def _value(kind: Any, value: Any, where: str, at: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kind = next(k for k in inner if k is not type(None))
        return None if value in ("", False) and not isinstance(value, int) else _value(kind, value, where, at)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: {at} must be a list")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UsageError(f"{where}: {at} must be a list of {len(inner)}")
        return tuple(_value(inner[0], v, where, f"{at}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, f"{at}.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where}: {at} must be {_WORDS[kind]}, not {value!r}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def as_toml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as a file that `load_recipe` reads back to the same."""
    lines = [f"name = {_toml(recipe.name)}", *([f"stage = {_toml(recipe.stage)}"] if recipe.stage else [])]
    for table, part in (
        ("model", recipe.model),
        ("data", recipe.data),
        ("train", recipe.train),
        ("eval", recipe.eval),
        ("build", recipe.build),
    ):
        if part is None:
            continue
        values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        sets = values.pop("sets", ())
        lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in values.items() if v is not None)]
        for one in sets:
            lines += ["", f"[[{table}.set]]", *(f"{k} = {_toml(v)}" for k, v in dataclasses.asdict(one).items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    import json

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
