"""Load both sides of a comparison as they are, in float32, and show them the same."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from llava_convert.app.ask.load import opened, whole
from llava_convert.app.logits.compare import Logits, coarser, compare_models
from llava_convert.app.logits.runtimes import runtime_for
from llava_convert.app.logits.shown import Shows
from llava_convert.app.options import AskOptions, SourceOptions
from llava_convert.core.progress import Reporter, stage
from llava_convert.core.tensors import QUANTS, TORCH_NAMES
from llava_convert.layouts.info import LAYOUTS
from llava_convert.layouts.registry import recognise
from llava_convert.model.recipe import Model
from llava_convert.storage.remote.reach import reach
from llava_convert.storage.remote.session import Session

_PRECISION = ("BF16", "F16", "F32")  # the fewest bits first; a merge, in float64, is as exact as float32 here


def compare_answers(
    source: str | Path,
    out: str | Path,
    options: SourceOptions,
    say: Reporter,
    *,
    device: str | None = None,
    runtime: str | None = None,
) -> Logits:
    """What built-in pictures and prompts make of both models; `runtime` is the program that computes the second.

    Raises what loading raises; UsageError for a runtime that does not read the layout, or is not installed.
    """
    from llava_convert.app.ask.transformers_runtime import load
    from llava_convert.app.logits.by_parts import ByParts

    asked = {one.name: getattr(options, one.name) for one in fields(SourceOptions)}
    # What helps to read a training checkpoint, and what is merged into it, is of the source alone.
    bases = {name: asked[name] for name in ("llm", "visual_encoder", "cache")}
    with ExitStack() as stack:
        sides = []
        for path, side in ((source, asked), (out, bases)):
            session = stack.enter_context(Session())
            if side is bases and _is_adapter(path, session, cache=options.cache):
                bases["base"] = asked["base"]  # without which it answers nothing
            ask = AskOptions(**side)
            checkpoint = opened(path, ask, say, session)
            row = runtime_for(runtime, checkpoint) if runtime is not None and side is bases else None
            model, made = whole(checkpoint, ask, say, session)
            sides.append((model, made, row))
        (first, made, _), (second, other, row) = sides
        dtype = narrowest(first, second)
        mine = ByParts(load(first, made, say, device=device, dtype="float32", four_bit=False))
        if row is None:
            theirs: Shows = ByParts(load(second, other, say, device=device, dtype="float32", four_bit=False))
        else:
            dtype = coarser(dtype, row.rounds)
            theirs = row.load(second.checkpoint, mine.runtime.device, options.visual_encoder)
            for note in row.notes(second.checkpoint):
                say.note(note)
        stage(say, "asking both")
        return compare_models(mine, theirs, dtype)


def _is_adapter(path: str | Path, session: Session, *, cache: bool) -> bool:
    target = LAYOUTS[recognise(reach(path, session, cache=cache)).layout].target
    return target is not None and target.adapters_alone


def narrowest(source: Model, out: Model) -> str:
    """The dtype that a tensor of one side was rounded to and the same of the other was not, with the fewest bits.

    Of blocks of ggml their type, in lower case; float32 where nothing was rounded: the two are computed in that.
    """
    found, blocks = "F32", set[str]()
    for name in source.recipes.keys() & out.recipes.keys():
        dtypes = {
            recipe.tensor.dtype if not recipe.ops else recipe.dtype
            for recipe in (source.recipes[name], out.recipes[name])
        }
        stored = {source.recipes[name].tensor.dtype, out.recipes[name].tensor.dtype}
        if len(stored) > 1:
            blocks |= stored & QUANTS.keys()
        if len(dtypes) > 1:
            found = min(found, *(d for d in dtypes if d in _PRECISION), key=_PRECISION.index)
    return min(blocks, key=_bits).lower() if blocks else TORCH_NAMES[found]


def _bits(block: str) -> float:
    """A block type's bits of a weight."""
    weights, size = QUANTS[block]
    return 8 * size / weights
