"""The stages of a recipe one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from llava_convert.core.errors import Interrupted, UsageError, not_a_choice
from llava_convert.core.progress import Reporter
from llava_convert.core.quiet import quiet_bitsandbytes, quiet_peft
from llava_convert.storage.output.signals import interrupt_on_sigterm

from .recipe import Recipe


def require_packages() -> None:
    """Raises UsageError (exit 2) where the extra `train` is not installed."""
    missing = [name for name in ("accelerate", "PIL") if find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {' and '.join(missing)}", hint="pip install 'llava-convert[train]'")
    quiet_bitsandbytes()
    quiet_peft()


def require_word(deepspeed: str) -> None:
    """Raises UsageError for what --deepspeed does not take; a dry run asks for nothing more of it."""
    from .distributed import WORDS

    if deepspeed and deepspeed not in WORDS:
        raise not_a_choice("--deepspeed", deepspeed, WORDS)


def run(stages: Sequence[Recipe], work_dir: Path | None, *, resume: bool, deepspeed: str, say: Reporter) -> Path:
    """Train every stage; each starts from the last checkpoint of the one before. Returns the last one.

    With `resume` a stage whose last checkpoint is there is passed over, a half done one is taken up.
    """
    require_packages()
    from accelerate import PartialState

    from .checkpoint import checkpoints, stage_one
    from .rows import require_file
    from .train import train

    for stage in stages:  # what the last one lacks is told before the first one takes its days
        build(stage)
        if stage.model.pretrained:
            stage_one(stage.model.pretrained)
        for one in (*stage.data.sets, *stage.eval.sets):
            require_file(Path(stage.data.root) / one.file)
    last: Path | None = None
    for stage in stages:
        folder = folder_of(stage, stages, work_dir)
        if last is not None and not stage.model.pretrained:
            stage = replace(stage, model=replace(stage.model, pretrained=str(last)))
        if not resume and checkpoints(folder):
            raise UsageError(f"{folder} holds checkpoints", hint="--resume takes them up; or choose another --work-dir")
        say.note(f"{stage.name} → {folder}")
        try:
            with interrupt_on_sigterm():
                last = train(stage, folder, resume=resume, deepspeed=deepspeed)
        except KeyboardInterrupt as stop:
            raise Interrupted(_left(checkpoints(folder))) from stop
    if last is None:
        raise UsageError("the recipe has no stage")
    PartialState().destroy_process_group()
    return last


def _left(found: Sequence[Path]) -> str:
    """What an interrupted run left, and how to go on."""
    if not found:
        return "interrupted before the first checkpoint: the same command starts again"
    names = ", ".join(path.name for path in found)
    return (
        f"interrupted: {found[-1].parent} holds {names}; the same command with --resume goes on from {found[-1].name}"
    )


def folder_of(stage: Recipe, stages: Sequence[Recipe], work_dir: Path | None) -> Path:
    """A single run has the work_dir to itself; stages get a folder each in it."""
    root = work_dir or Path("work_dirs") / stages[0].name.removesuffix(f"-{stages[0].stage}")
    return root / stage.stage if stage.stage else root


def build(stage: Recipe) -> None:
    """Make what a recipe makes for itself. Raises UsageError for a kind that does not exist."""
    if stage.build is not None:
        from . import shapes

        if stage.build.kind != "tiny-shapes":
            raise UsageError(f"build.kind {stage.build.kind!r}: there is only tiny-shapes")
        shapes.build(Path(stage.build.folder), seed=stage.train.seed)
