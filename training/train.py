"""The whole of a training run, from top to bottom: recipe, model, data, loop, checkpoints.

One process or many, with or without DeepSpeed or FSDP: accelerate is the engine, set up by its own launcher
(`accelerate launch`, `torchrun`) or by `deepspeed=`. What is computed in an iteration, and in which order, is what
xtuner 0.1.23 computes; the tests compare the two.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer

from llava_convert.core.errors import ConvertError, InputError, UsageError

from . import distributed
from .checkpoint import Progress, Resumable, checkpoints, prune, read_checkpoint, stage_one, write_checkpoint
from .conversations import left_out_words
from .data import Conversations, Pictures, collate
from .evaluate import Evaluation, forget_later
from .logs import Log
from .model import Llava, loading, vision_config
from .recipe import PARTS, Recipe, TrainRecipe
from .sampler import Batches, LengthGrouped, Order, Shuffled
from .schedule import Schedule
from .xtuner_config import as_xtuner_config


def train(recipe: Recipe, work_dir: Path, *, resume: bool = False, deepspeed: str = "") -> Path:
    """Train, and return the last checkpoint. With `resume` the newest one in `work_dir` is taken up.

    Raises InputError for data and models that are missing or wrong and for a loss that is not finite, UsageError for
    settings that this machine cannot do.
    """
    settings = recipe.train
    if recipe.model.pretrained:
        first = str(stage_one(recipe.model.pretrained))
        recipe = replace(recipe, model=replace(recipe.model, pretrained=first))
    recipe = _found_from(work_dir, recipe)
    vision = vision_config(recipe.model.visual_encoder)
    image_tokens = (vision.image_size // vision.patch_size) ** 2
    # Refuses what xtuner's format cannot say, before anything is loaded.
    as_xtuner_config(recipe, image_tokens=image_tokens)
    accelerator = _accelerator(recipe, work_dir, deepspeed)
    main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    found = checkpoints(work_dir) if resume else []
    last = found[-1] if found else None
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    taken_up = _taken_up(last, world, by_deepspeed=by_deepspeed) if last else None
    start = taken_up.iteration if taken_up else 0
    seed = taken_up.seed if taken_up else settings.seed
    torch.manual_seed(seed)  # the projector and the adapters start the same everywhere

    # --- data
    with loading(recipe.model.llm):
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.llm)
    with loading(recipe.model.visual_encoder):
        processor = AutoImageProcessor.from_pretrained(recipe.model.visual_encoder)
    pictures = Pictures(processor, recipe.data.pad_image_to_square, vision.image_size)
    read = partial(
        Conversations,
        recipe.data,
        tokenizer,
        pictures,
        image_tokens=image_tokens,
        cache=work_dir / "tokens",
        seed=seed,
    )
    evaluation = None
    with accelerator.main_process_first():  # the first one fills the cache of token ids
        data = read()
        if recipe.eval.every:
            held_out = read(sets=recipe.eval.sets) if recipe.eval.sets else data.hold_out(recipe.eval.rows)
            evaluation = Evaluation(recipe.eval, held_out, tokenizer, settings.batch_size)
    for name, left_out in data.left_out.items() if main else ():
        for line in left_out_words(left_out):
            print(f"{name}: {line}", file=sys.stderr)

    # --- length of the run
    group = settings.batch_size * settings.accumulate
    order: Order = (
        LengthGrouped(data.lengths, group, seed, rank, world)
        if recipe.data.sampler == "length_grouped"
        else Shuffled(len(data), seed, rank, world)
    )
    batches = Batches(order, settings.batch_size, start=start)
    epoch = len(batches)  # iterations
    iterations = settings.max_iters or int(settings.epochs * epoch)
    # What does not fill a step at the end makes a smaller one, as in mmengine's OptimWrapper.
    tail = iterations % settings.accumulate
    # Saved between two steps of the optimiser, a checkpoint would lose gradients.
    save_every = -(-settings.save_steps // settings.accumulate) * settings.accumulate
    schedule = Schedule.of_recipe(settings, iterations)
    config = as_xtuner_config(recipe, image_tokens=image_tokens, warm=schedule.warmup > 0)

    if main and schedule.warmup == 1:
        print(
            f"a warm-up of one iteration leaves the rate at {schedule.at(0):.1e}, as mmengine has it: "
            "--set mmengine_warmup=false, or a larger warmup_ratio",
            file=sys.stderr,
        )
    if main and taken_up and taken_up.processes and taken_up.config != config:
        before = taken_up.config.splitlines()
        changed = [line.strip() for line in config.splitlines() if line not in before]
        print(f"the recipe is another than that of {last}: {'; '.join(changed)}", file=sys.stderr)
    if last and start >= iterations:
        if main:
            print(f"{last}: trained to the end ({iterations} iterations), nothing is left to do", file=sys.stderr)
        return last

    # --- model
    zero = accelerator.state.deepspeed_plugin.zero_stage if by_deepspeed else 0
    model = Llava(recipe.model, reentrant=zero == 3)
    if taken_up and taken_up.state:
        model.load_trained(taken_up.state, str(last), complete=True)

    # --- optimiser: of every parameter, in the module's order, so that its state has mmengine's numbers
    groups = _groups(model, settings)
    schedules = [Schedule.of_recipe(settings, iterations, part=part) for part in groups]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": one.lr, "initial_lr": one.lr}
            for parameters, one in zip(groups.values(), schedules, strict=True)
        ],
        settings.lr, settings.betas, settings.eps, settings.weight_decay,
    )  # fmt: skip
    if taken_up and taken_up.optimizer and not fsdp:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": taken_up.optimizer})
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if taken_up and fsdp:
        distributed.spread(wrapped, model, optimizer, taken_up.optimizer)
    if last and last.is_dir():
        distributed.load_folder(wrapped, last, zero)

    # --- loop
    loader = DataLoader(
        data, batch_sampler=batches, collate_fn=collate,
        num_workers=min(recipe.data.workers, os.cpu_count() or 1),  # more are slower, and torch warns of them
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    if main:
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / f"{recipe.name}.py").write_text(config, encoding="utf-8")
        forget_later(work_dir, start)
    accelerator.init_trackers(recipe.name, init_kwargs={"tensorboard": {"purge_step": start + 1}})
    log = Log(work_dir, iterations, start, settings.log_every) if main else None
    wrapped.train()
    accelerator.step = start % settings.accumulate
    clock = time.perf_counter()
    try:
        for iteration, batch in zip(range(start, iterations), loader, strict=False):
            if isinstance(batch, ConvertError):
                raise batch
            # Dropout depends on where the run is, not on how often it was taken up again.
            torch.manual_seed(seed + 1_000_003 * (iteration + 1) + rank)
            for one, planned in zip(optimizer.param_groups, schedules, strict=True):
                one["lr"] = planned.at(iteration)
            if tail and iteration == max(start, iterations - tail):
                accelerator.gradient_accumulation_steps, accelerator.step = tail, iteration + tail - iterations
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            norm = None
            with accelerator.accumulate(wrapped):  # the optimiser moves with the last micro-batch of a step
                loss = wrapped(**batch)
                shown = float(accelerator.reduce(loss.detach(), "mean"))
                _check_finite(shown, "loss", iteration, last)
                if by_deepspeed:  # which divides by the steps that it was set up with
                    loss = loss * (settings.accumulate / accelerator.gradient_accumulation_steps)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_norm)
                    if norm is not None and settings.dtype != "fp16":  # where such a step is left out
                        _check_finite(float(norm), "gradient's norm", iteration, last)
                optimizer.step()
                optimizer.zero_grad()
            now = time.perf_counter()
            if log is not None:
                norm = None if norm is None else float(norm)
                rate = schedule.at(iteration)
                log.add(iteration + 1, {"loss": shown, "lr": rate, "grad_norm": norm, "time": now - clock})
                accelerator.log({"train/loss": shown, "train/lr": rate}, step=iteration + 1)
            if evaluation is not None and evaluation.due(iteration + 1, iterations):
                judged, answers = evaluation.run(accelerator, wrapped)
                if main:
                    evaluation.write(work_dir, iteration + 1, judged, answers)
                accelerator.log({"eval/loss": judged}, step=iteration + 1)
            clock = time.perf_counter()
            if (iteration + 1) % save_every == 0 or iteration + 1 == iterations:
                for one, planned in zip(optimizer.param_groups, schedules, strict=True):
                    one["lr"] = planned.at(iteration + 1)  # as mmengine, whose schedulers have moved on by then
                last = work_dir / f"iter_{iteration + 1}.pth"
                progress = Progress(
                    iteration + 1, iterations, (iteration + 1) // epoch, settings.epochs, seed, config, recipe.name,
                    log.scalars() if log else {}, log.eta if log else 0.0, world,
                )  # fmt: skip
                moved = schedule.state(iteration + 1, schedules)
                if by_deepspeed:
                    distributed.write_folder(wrapped, last, moved, progress)
                else:
                    state, moments = distributed.gathered(accelerator, wrapped, model, optimizer)
                    if main:
                        write_checkpoint(last, model.trained_state(state), moments, moved, progress)
                accelerator.wait_for_everyone()
                if main:
                    prune(work_dir, settings.keep)
    finally:
        if log is not None:
            log.close()
        for tracker in accelerator.trackers:  # not end_training(): the next stage needs the group of processes
            tracker.finish()
    if last is None:
        raise UsageError(f"recipe {recipe.name}: no iteration to train", hint="set train.epochs or train.max_iters")
    return last


def _groups(model: Llava, settings: TrainRecipe) -> dict[str, list[torch.nn.Parameter]]:
    """The optimiser's groups, by the part whose rate is theirs: one, where all parts have the same.

    In the module's order, so that the optimiser's state has mmengine's numbers. A part that is not trained goes along
    with the next one, since DeepSpeed takes no group that nothing is trained of.
    """
    if len({settings.rate_of(part) for part in PARTS}) == 1:
        return {PARTS[-1]: list(model.parameters())}
    found: dict[str, list[torch.nn.Parameter]] = {}
    waiting: list[torch.nn.Parameter] = []
    for part in PARTS:
        waiting += getattr(model, part).parameters()
        if any(parameter.requires_grad for parameter in waiting):
            found[part], waiting = waiting, []
    return found


def _check_finite(value: float, what: str, iteration: int, last: Path | None) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"the {what} of iteration {iteration + 1} is {value}: nothing was saved of it",
            hint=f"the last good checkpoint is {last or 'none'}; a lower train.lr, or train.dtype=bf16",
        )


def _found_from(work_dir: Path, recipe: Recipe) -> Recipe:
    """The recipe with its bases named so that what converts a checkpoint finds them: it looks from the work_dir up."""
    if Path.cwd() in work_dir.absolute().parents:
        return recipe
    paths = {key: getattr(recipe.model, key) for key in ("llm", "visual_encoder", "pretrained")}
    local = {key: str(Path(path).absolute()) for key, path in paths.items() if path and Path(path).exists()}
    return replace(recipe, model=replace(recipe.model, **local))  # type: ignore[arg-type]  # names of texts alone


def _taken_up(last: Path, world: int, *, by_deepspeed: bool) -> Resumable:
    """The checkpoint to go on from. Raises UsageError where it is of another kind of run than this one."""
    if last.is_dir() and not by_deepspeed:
        raise UsageError(f"{last} is a DeepSpeed checkpoint", hint="resume it with the same --deepspeed")
    if by_deepspeed and not last.is_dir():
        raise UsageError(f"{last} is not a DeepSpeed checkpoint", hint="resume it without --deepspeed")
    found = read_checkpoint(last)
    if found.processes not in (None, world):
        raise UsageError(
            f"{last} is of a run of {found.processes} processes, this one has {world}: the order of the data and the "
            "count of iterations would be others",
            hint=f"resume with {found.processes}, or start a new run from it: --set model.pretrained={last}",
        )
    return found


def _accelerator(recipe: Recipe, work_dir: Path, deepspeed: str) -> Accelerator:
    """The engine: precision, accumulation, trackers, and DeepSpeed where asked for."""
    settings = recipe.train
    options: dict[str, Any] = {}
    on_cpu = not torch.cuda.is_available()
    AcceleratorState._reset_state()  # the stage before may have had another precision
    if deepspeed:
        distributed.environment()
        options["deepspeed_plugin"] = distributed.deepspeed_plugin(recipe, deepspeed)
        if on_cpu:
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=distributed.gloo_in_order())]
    else:
        # The tower's last layers, which the projector does not read, and what only other samples use, get no gradient.
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    precision = {"fp32": "no"}.get(settings.dtype, settings.dtype)
    if precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("train.dtype fp16 needs a GPU", hint="--set train.dtype=fp32, or bf16")
    return Accelerator(
        # Without a GPU accelerate takes several processes for one each, unless it is told that this is meant.
        cpu=on_cpu and "WORLD_SIZE" in os.environ and not deepspeed,
        mixed_precision=precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with=_trackers(settings.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(work_dir / "tensorboard")),
        **options,
    )


def _trackers(asked: Sequence[str]) -> list[str]:
    """accelerate's trackers: those asked for, and TensorBoard, which sends nothing elsewhere, where it is installed."""
    missing = [name for name in asked if find_spec(name) is None]
    if missing:
        raise UsageError(f"train.trackers: {missing[0]} is not installed", hint=f"pip install {missing[0]}")
    for name in asked:
        try:
            import_module(name)
        except ImportError as problem:  # installed without what it needs
            raise UsageError(
                f"train.trackers: {name} cannot be imported ({problem})", hint=f"pip install --upgrade {name}"
            ) from problem
    return list(dict.fromkeys([*asked, *(["tensorboard"] if find_spec("tensorboard") else [])]))
