"""Tensors beside the parts of a LLaVA that no table has: left out where that is asked for, or a part is wanted."""

from __future__ import annotations

from dataclasses import replace

from llava_convert.core.errors import UnsupportedError
from llava_convert.model.checkpoint import LLM, VISION, Checkpoint, Dropped
from llava_convert.model.checks import refuse_unknown_family
from llava_convert.model.options import ALL, DROP

ASKED = "no table has it, and --extra drop leaves it out"
_OTHER_PART = "no table has it, and one part alone is asked for"


def without_extra(checkpoint: Checkpoint, part: str, extra: str) -> Checkpoint:
    """The checkpoint less the tensors that no table has, which it then lists as dropped.

    Raises UnsupportedError (exit 4) where the whole is wanted and nobody said that they may go, and for a part of a
    family that no table has.
    """
    refuse_unknown_family(checkpoint, [one for one in (LLM, VISION) if part in (ALL, one)])
    if checkpoint.extra is None:
        return checkpoint
    if part == ALL and extra != DROP:
        raise UnsupportedError(
            f"{checkpoint.path}: {checkpoint.extra.problem}",
            hint="--extra drop leaves them out; --part llm (or projector, visual-encoder) takes a part that is whole; "
            "--table FILE.toml adds their names",
        )
    reason = ASKED if extra == DROP else _OTHER_PART
    gone = tuple(Dropped(name, reason) for name in checkpoint.extra.names)
    return replace(checkpoint, extra=None, dropped=(*checkpoint.dropped, *gone))
