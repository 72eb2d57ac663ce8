"""The stage-1 checkpoint that a training started from (`pretrained_pth`): the source of parts frozen since.

xtuner loads it by name after it has put a part under peft, so its whole weights reach the parts that are neither
trained whole nor under LoRA later (facts from 0.1.23's LLaVAModel.__init__, and from checkpoints that it trained so).
Its own converter ignores it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_convert.core.errors import ConvertError
from llava_convert.layouts.registry import open_checkpoint
from llava_convert.model.checkpoint import PART_NAMES, PARTS, Checkpoint
from llava_convert.storage.remote.reach import reach
from llava_convert.storage.remote.session import Session


def with_stage_one(checkpoint: Checkpoint, named: str | Path | None, session: Session) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with the parts that it lacks and stage 1 trained; and what there is to tell.

    `named` is what the user gives, here or remote; else the training config names it. Raises what reaching and opening
    `named` raises; one that only the config names is told of instead.
    """
    asked = str(named) if named else (checkpoint.training.pretrained_pth if checkpoint.training else None)
    absent = [part for part in PARTS if checkpoint.parts[part].state == "absent"]
    if asked is None or not (absent or named):
        return checkpoint, []
    found = stage_one(checkpoint, named, session)
    if found is None:
        name = Path(asked).name
        return checkpoint, [
            f"the stage-1 checkpoint {name} that training started from was not found: if it trained the "
            f"{' or the '.join(PART_NAMES[part] for part in absent)}, that is lost (--pretrained-pth gives it)"
        ]
    try:
        first, _ = session.once((open_checkpoint, found), lambda: open_checkpoint(found))
    except ConvertError as problem:
        if named:
            raise
        return checkpoint, [f"the stage-1 checkpoint {found.name} cannot be read ({problem.message})"]
    for part in absent:
        weights = first.parts[part].weights
        if weights and first.parts[part].adapter is None:
            own = replace(checkpoint.parts[part], weights=weights, origin="stage 1")
            checkpoint = checkpoint.with_part(part, own)
    return checkpoint, []


def stage_one(checkpoint: Checkpoint, named: str | Path | None, session: Session) -> Path | None:
    """Where the stage-1 checkpoint is: the one that is named, or the one that the training config names.

    None where there is none. Raises what reaching `named` raises.
    """
    if named:
        return session.once((reach, str(named)), lambda: reach(named, session))
    asked = checkpoint.training.pretrained_pth if checkpoint.training else None
    return _find(asked, checkpoint) if asked else None


def _find(asked: str, checkpoint: Checkpoint) -> Path | None:
    path = Path(asked)
    places = [path]
    if not path.is_absolute():
        places += [parent / path for parent in checkpoint.path.absolute().parents]
    try:
        return next((place for place in places if place.exists()), None)
    except OSError:  # a name that is too long
        return None
