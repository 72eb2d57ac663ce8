"""Open what a user names: the source by its headers, laid over its base, with its adapters and its first stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_convert.app.adapters import with_adapters, with_base, with_projector
from llava_convert.app.options import SourceOptions
from llava_convert.app.stage_one import with_stage_one
from llava_convert.core.flags import as_path
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.info import LAYOUTS
from llava_convert.layouts.registry import Recognised, recognise
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.model.recipe import Bases
from llava_convert.storage.remote.reach import reach
from llava_convert.storage.remote.session import Session


def open_source(
    source: str | Path, options: SourceOptions, session: Session, *, dequantize: bool = False
) -> tuple[Checkpoint, str]:
    """The source by its headers, and why it was taken for what it is."""
    found = recognised(source, options, session)
    return found.open(open_options(options, session, dequantize)), found.why


def open_options(options: SourceOptions, session: Session, dequantize: bool) -> OpenOptions:
    mmproj = None if options.mmproj is None else reach(options.mmproj, session, cache=options.bases.cache)
    return OpenOptions(as_path(options.config), dequantize, mmproj)


def recognised(source: str | Path, options: SourceOptions, session: Session) -> Recognised:
    """The source, looked at. Raises what `recognise` and `reach` raise."""
    path = reach(source, session, cache=options.bases.cache)
    return recognise(path, options.source_layout, config_from(options, session))


def config_from(options: SourceOptions, session: Session) -> Path | None:
    """The folder that `--config-from` names, for weights without a config."""
    return None if options.config_from is None else reach(options.config_from, session, cache=options.bases.cache)


def open_whole(
    source: str | Path, options: SourceOptions, session: Session, *, dequantize: bool = False
) -> tuple[Checkpoint, list[str]]:
    """The source with its adapters and its stage 1, and what there is to tell of the latter."""
    checkpoint, _, told = made_whole(open_source(source, options, session, dequantize=dequantize), options, session)
    return checkpoint, told


def made_whole(
    opened: tuple[Checkpoint, str], options: SourceOptions, session: Session, to: str | None = None
) -> tuple[Checkpoint, str, list[str]]:
    """The source, why it was taken for what it is, and what there is to tell of its stage 1.

    It is laid over its base, but for a target `to` of adapters alone.
    """
    checkpoint, why = opened
    checkpoint = with_projector(checkpoint, options, session)
    target = None if to is None else LAYOUTS[to].target
    if target is None or not target.adapters_alone:
        checkpoint = with_base(checkpoint, options, session)
    checkpoint = with_adapters(checkpoint, options.adapters, session)
    checkpoint, told = with_stage_one(checkpoint, options.pretrained_pth, session)
    return checkpoint, why, told


def bases_left(bases: Bases, checkpoint: Checkpoint) -> Bases:
    """What is asked of bases, less what the source was laid over as a whole."""
    used = {layer.asked for layer in checkpoint.layers}
    return replace(bases, llm=None) if bases.llm in used else bases
