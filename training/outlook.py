"""What a run will be, and what it lacks, before it is started: nothing is loaded, and nothing asked of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_convert.core.errors import ConvertError

from . import sizes
from .bases import local_config, local_encoder
from .check import SetCheck, check
from .checkpoint import stage_one
from .recipe import ModelRecipe, Recipe
from .sampler import Batches, LengthGrouped, Order, Shuffled
from .schedule import Schedule


@dataclass(frozen=True)
class Outlook:
    """What a run will be: its data, iterations and sizes, what it starts from, and what is missing for it.

    Iterations are None where the data are not complete, sizes where the base models are not on this machine and not
    known either.
    """

    recipe: Recipe
    sets: Sequence[SetCheck]
    iterations: int | None
    sizes: sizes.Sizes | None
    start: str
    missing: Sequence[str]

    @property
    def samples(self) -> dict[str, int]:
        """Conversations to train on, by set, as often as they are taken."""
        return {one.name: seen.taken for one, seen in zip(self.recipe.data.sets, self.sets, strict=False)}

    def lines(self) -> list[str]:
        found = [line for one in self.sets for line in one.lines()]
        train = self.recipe.train
        if self.iterations is not None:
            steps = -(-self.iterations // train.accumulate)
            total = f"{sum(self.samples.values()):,} conversations"
            found.append(f"{total}: {self.iterations:,} iterations of {train.batch_size} a process, {steps:,} steps")
            schedule = Schedule.of_recipe(train, self.iterations)
            if schedule.warmup == 1:
                found.append("the warm-up is of one iteration, and mmengine leaves the rate where it starts")
        if self.sizes is not None:
            for part, (every, trained) in self.sizes.parameters.items():
                found.append(f"{part}: {every:,} parameters, {trained:,} trained")
            found.append(f"memory of one process without DeepSpeed: {self.sizes.memory}")
        found.append(f"starts from: {self.start}")
        return found + [f"missing: {one}" for one in self.missing]

    def as_json(self) -> dict[str, Any]:
        known = self.sizes
        return {
            "name": self.recipe.name,
            "sets": self.samples,
            "pictures": sum(one.pictures for one in self.sets),
            "iterations": self.iterations,
            "steps": None if self.iterations is None else -(-self.iterations // self.recipe.train.accumulate),
            "parameters": {k: {"all": a, "trained": t} for k, (a, t) in known.parameters.items()} if known else None,
            "weights_bytes": known.weights if known else None,
            "optimizer_bytes": known.optimizer if known else None,
            "start": self.start,
            "missing": list(self.missing),
        }


def outlook(recipe: Recipe, *, before: str = "", processes: int = 1) -> Outlook:
    """Count what a run will take, for so many processes. `before` is the stage that it goes on from, if it has one."""
    missing: list[str] = []
    seen = check(recipe, local_encoder(recipe))
    missing += [f"data set {one.name}: {one.problem}" for one in seen if not one.sound]
    total = sum(found.taken for found in seen[: len(recipe.data.sets)])
    held = recipe.eval.rows if recipe.eval.every and not recipe.eval.sets else 0
    if held and total < 2 * held:
        missing.append(f"{total} conversations are too few to hold {held} of them out: eval.rows, or [[eval.set]]")
    iterations = None if missing else _iterations(recipe, total - held, processes)
    found = _sizes(recipe.model)
    if found is None:
        missing.append(f"{recipe.model.llm} or {recipe.model.visual_encoder}: not on this machine, its size is unknown")
    return Outlook(recipe, seen, iterations, found, _start(recipe, before, missing), missing)


def _iterations(recipe: Recipe, total: int, processes: int) -> int:
    train = recipe.train
    order: Order = (
        LengthGrouped([1] * total, train.batch_size * train.accumulate, train.seed, 0, processes)
        if recipe.data.sampler == "length_grouped"
        else Shuffled(total, train.seed, 0, processes)
    )
    return train.max_iters or int(train.epochs * len(Batches(order, train.batch_size)))


def _start(recipe: Recipe, before: str, missing: list[str]) -> str:
    """What the run starts from, in words."""
    if not recipe.model.pretrained:
        return f"the last checkpoint of {before}" if before else "a new projector"
    try:
        path = stage_one(recipe.model.pretrained)
        from .model import stored_trained

        tensors = stored_trained(path)
        model = empty_model(recipe.model)
        if model is not None:
            model.require_fit({name: one.shape for name, one in tensors.items()}, str(path))
    except ConvertError as problem:
        missing.append(f"{problem.message} ({problem.hint})")
        return recipe.model.pretrained
    parts: dict[str, int] = {}
    for name in tensors:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return f"{path}: " + ", ".join(f"{count} tensors of {part}" for part, count in parts.items())


def _sizes(recipe: ModelRecipe) -> sizes.Sizes | None:
    model = empty_model(recipe)
    if model is not None:
        counted = {
            name: (
                sum(p.numel() for p in part.parameters()),
                sum(p.numel() for p in part.parameters() if p.requires_grad),
            )
            for name, part in model.named_children()
        }
        return sizes.weighed(recipe, counted)
    shapes = dict(sizes.KNOWN)
    for name, vision in ((recipe.llm, False), (recipe.visual_encoder, True)):
        config = None if name in shapes else local_config(name, vision=vision)
        if config is not None and (shape := sizes.Shape.of_config(config)) is not None:
            shapes[name] = shape
    return sizes.sizes_of(recipe, shapes) if {recipe.llm, recipe.visual_encoder} <= set(shapes) else None


def empty_model(recipe: ModelRecipe) -> Any:
    """The model without weights; None where a base model is not on this machine."""
    if local_config(recipe.llm) is None or local_config(recipe.visual_encoder, vision=True) is None:
        return None
    from accelerate import init_empty_weights

    from .model import Llava

    with init_empty_weights():
        return Llava(replace(recipe, pretrained="", quantization=""), empty=True)
