"""The stages of a recipe one after the other, and what a run will take before it is started."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.progress import Reporter

from .recipe import Recipe

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def require_packages() -> None:
    """Raises UsageError (exit 2) where the extra `train` is not installed."""
    missing = [name for name in ("accelerate", "PIL") if find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {' and '.join(missing)}", hint="pip install 'llava-convert[train]'")


def run(stages: Sequence[Recipe], work_dir: Path | None, *, resume: bool, deepspeed: str, say: Reporter) -> Path:
    """Train every stage; each starts from the last checkpoint of the one before. Returns the last one.

    With `resume` a stage whose last checkpoint is there is passed over, a half done one is taken up.
    """
    require_packages()
    from accelerate import PartialState

    # peft imports bitsandbytes where it is installed, which on some CPUs asks for one package more.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from .checkpoint import checkpoints
    from .data import require_file
    from .train import train

    for stage in stages:  # what the last one lacks is told before the first one takes its days
        _build(stage)
        for one in stage.data.sets:
            require_file(Path(stage.data.root) / one.file)
    last: Path | None = None
    for stage in stages:
        folder = _folder(stage, stages, work_dir)
        if last is not None and not stage.model.pretrained:
            stage = replace(stage, model=replace(stage.model, pretrained=str(last)))
        if not resume and checkpoints(folder):
            raise UsageError(f"{folder} holds checkpoints", hint="--resume takes them up; or choose another --work-dir")
        folder.mkdir(parents=True, exist_ok=True)
        say.note(f"{stage.name} → {folder}")
        last = train(stage, folder, resume=resume, deepspeed=deepspeed)
    if last is None:
        raise UsageError("the recipe has no stage")
    PartialState().destroy_process_group()
    return last


def _folder(stage: Recipe, stages: Sequence[Recipe], work_dir: Path | None) -> Path:
    """A single run has the work_dir to itself; stages get a folder each in it."""
    root = work_dir or Path("work_dirs") / stages[0].name.removesuffix(f"-{stages[0].stage}")
    return root / stage.stage if stage.stage else root


def _build(stage: Recipe) -> None:
    if stage.build is not None:
        from . import shapes

        if stage.build.kind != "tiny-shapes":
            raise UsageError(f"build.kind {stage.build.kind!r}: there is only tiny-shapes")
        shapes.build(Path(stage.build.folder), seed=stage.train.seed)


@dataclass(frozen=True)
class Outlook:
    """What a run will be: samples, iterations, and the memory that one process needs."""

    recipe: Recipe
    sets: dict[str, int]
    pictures: int
    iterations: int
    steps: int
    parameters: dict[str, tuple[int, int]]
    weights: int
    optimizer: int

    def lines(self) -> list[str]:
        found = [f"{name}: {count:,} conversations" for name, count in self.sets.items()]
        found.append(f"{sum(self.sets.values()):,} conversations, {self.pictures:,} of them about a picture")
        found.append(
            f"{self.iterations:,} iterations of {self.recipe.train.batch_size} a process, {self.steps:,} steps"
        )
        for part, (every, trained) in self.parameters.items():
            found.append(f"{part}: {every:,} parameters, {trained:,} trained")
        found.append(
            f"memory of one process without DeepSpeed: weights {self.weights / 1e9:.1f} GB, gradients and optimiser "
            f"{self.optimizer / 1e9:.1f} GB, and the activations"
        )
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.recipe.name,
            "sets": self.sets,
            "pictures": self.pictures,
            "iterations": self.iterations,
            "steps": self.steps,
            "parameters": {k: {"all": a, "trained": t} for k, (a, t) in self.parameters.items()},
            "weights_bytes": self.weights,
            "optimizer_bytes": self.optimizer,
        }


def outlook(recipe: Recipe, *, processes: int = 1) -> Outlook:
    """Count what a run will take, for so many processes; loads no weight and no picture.

    Raises InputError for data files that are missing.
    """
    require_packages()
    from accelerate import init_empty_weights

    from .data import read_rows
    from .model import Llava

    _build(recipe)
    sets: dict[str, int] = {}
    pictures = 0
    for one in recipe.data.sets:
        count = 0
        for _, row in read_rows(Path(recipe.data.root) / one.file):
            count += one.repeats
            pictures += one.repeats * (row.get("image") is not None)
        sets[one.name] = sets.get(one.name, 0) + count
    total = sum(sets.values())
    if not total:
        raise InputError("the data hold no conversation")
    train = recipe.train
    group = train.batch_size * train.accumulate
    epoch = -(-total // (processes * group)) * train.accumulate
    iterations = train.max_iters or int(train.epochs * epoch)
    with init_empty_weights():
        model = Llava(replace(recipe.model, pretrained="", quantization=""), empty=True)
    parameters = {}
    weights = optimizer = 0
    for name, part in model.named_children():
        counts = [(p.numel(), p.requires_grad) for p in part.parameters()]
        every, trained = sum(n for n, _ in counts), sum(n for n, wanted in counts if wanted)
        parameters[name] = (every, trained)
        size = 4.0 if name != "llm" else 0.55 if recipe.model.quantization else _BYTES[recipe.model.llm_dtype]
        weights += int(every * size)
        optimizer += trained * 12  # a gradient and AdamW's two moments, float32 each
    return Outlook(recipe, sets, pictures, iterations, iterations // train.accumulate, parameters, weights, optimizer)
