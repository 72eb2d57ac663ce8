"""What a checkpoint is, by its headers: parts, sizes, what it lacks, and what it can become."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from llava_convert.app.adapters import ignored_note
from llava_convert.app.next_step import to_try, typed
from llava_convert.app.options import Options, SourceOptions
from llava_convert.app.planning import assembled, lowered
from llava_convert.app.session import job_session
from llava_convert.app.source import open_source
from llava_convert.core.errors import ConvertError
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.values import dataclass
from llava_convert.engine.record import dropped_texts
from llava_convert.layouts.defaults import refuse_quantised
from llava_convert.layouts.info import LAYOUTS, TARGETS
from llava_convert.layouts.kinds import Known, Told, known
from llava_convert.layouts.registry import look
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, PARTS, Checkpoint
from llava_convert.model.options import ALL
from llava_convert.model.quantized import packed
from llava_convert.storage.remote.files import Traffic
from llava_convert.storage.remote.mounts import mounted
from llava_convert.storage.remote.session import Session


@dataclass(frozen=True)
class PartFound:
    """One part of a checkpoint."""

    name: str
    state: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    detail: str


@dataclass(frozen=True, repr=False)
class Inspection:
    """The result of `inspect`. `targets` maps each layout to None, or to the reason why it cannot be made.

    `kind` is what it is, `use` what it can be used for, `next` the command to type next. `layout` is None if this tool
    cannot convert it.
    """

    path: Path | str
    layout: str | None
    why: str
    parts: tuple[PartFound, ...]
    settings: dict[str, Any]
    targets: dict[str, str | None]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    kind: str
    use: str
    next: str
    details: tuple[str, ...] = field(default=())
    fetched: Traffic = field(default_factory=Traffic)

    def __repr__(self) -> str:
        """One line for a notebook; the fields and `as_json()` say everything."""
        can = ", ".join(target for target, why_not in self.targets.items() if why_not is None) or "nothing as it is"
        if self.layout is None:
            return f"Inspection({self.path}: {self.kind})"
        return f"Inspection({self.path}: {self.layout}, {len(self.parts)} parts, can become {can})"

    def as_json(self) -> dict[str, Any]:
        return {
            "source": str(self.path),
            "layout": self.layout,
            "why": self.why,
            "kind": self.kind,
            "use": self.use,
            "next": self.next,
            "parts": {
                p.name: {
                    "state": p.state,
                    "tensors": p.tensors,
                    "bytes": p.bytes,
                    "dtypes": list(p.dtypes),
                    "detail": p.detail,
                }
                for p in self.parts
            },
            "settings": self.settings,
            "targets": {k: {"possible": v is None, "missing": v} for k, v in self.targets.items()},
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "details": list(self.details),
            "bytes_fetched": self.fetched.bytes,
        }


def inspect(source: str | Path, options: SourceOptions | None = None) -> Inspection:
    """Look at a checkpoint without reading a weight. Raises what opening raises."""
    with job_session(options) as session:
        return _inspect(source, options or SourceOptions(), session)


def _inspect(source: str | Path, options: SourceOptions, session: Session) -> Inspection:
    try:
        checkpoint, why = open_source(source, options, session)
    except Told as problem:
        return _other(problem, session)
    targets = {
        to: _problem(source, (checkpoint, why), Options.of(options, to), session)
        for to in TARGETS
        if to != checkpoint.layout or not checkpoint.as_written
    }
    stubs = (f"pickled names left inert: {', '.join(checkpoint.stubs)}",) if checkpoint.stubs else ()
    told = _told(checkpoint, session)
    return Inspection(
        path=session.address_of(checkpoint.path),
        layout=checkpoint.layout,
        why=why,
        parts=tuple(_part(checkpoint, name) for name in PARTS),
        settings=_settings(checkpoint),
        targets=targets,
        notes=tuple(map(session.called, (*checkpoint.notes, *_beside(checkpoint), *dropped_texts(checkpoint)))),
        warnings=tuple(map(session.called, checkpoint.warnings)),
        kind=told.what if told else LAYOUTS[checkpoint.layout].description,
        use=told.use if told else f"{_called(checkpoint)}: convert it to a layout that your program loads",
        next=session.called(told.next) if told else to_try(typed(source), targets, options),
        details=stubs,
        fetched=session.fetched,
    )


def _other(problem: Told, session: Session) -> Inspection:
    """An inspection of what is not a checkpoint: what it is instead."""
    return Inspection(
        path=session.address_of(problem.path),
        layout=None,
        why="",
        parts=(),
        settings={},
        targets={},
        notes=(),
        warnings=(),
        kind=problem.known.what,
        use=problem.known.use,
        next=session.called(problem.known.next),
        fetched=session.fetched,
    )


def _called(checkpoint: Checkpoint) -> str:
    part = checkpoint.default_part
    return "a LLaVA" if part == ALL else f"a {PART_NAMES[part]} alone"


def _told(checkpoint: Checkpoint, session: Session) -> Known | None:
    """What a part of a LLaVA is good for; None for a whole one, and where no row of the table knows the part."""
    return known(look(checkpoint.path)) if checkpoint.default_part != ALL else None


def _beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    note = ignored_note(checkpoint)
    return () if note is None else (note,)


def _part(checkpoint: Checkpoint, name: str) -> PartFound:
    part = checkpoint.parts[name]
    tensors = {**part.weights, **(part.adapter.tensors if part.adapter else {})}
    detail = f"{checkpoint.quantization}; " if checkpoint.quantization is not None and packed(part) else ""
    if part.adapter is not None:
        ranks = sorted({module.rank for module in part.adapter.modules.values()})
        alpha = part.adapter.settings.lora_alpha if part.adapter.settings else "unknown"
        if ranks:
            detail += f"LoRA r={'/'.join(map(str, ranks))} alpha={alpha} on {len(part.adapter.modules)} modules; "
        else:
            detail += "trained whole, beside an adapter; "
    if part.state != "full" and name != "projector":
        base = part.base or (checkpoint.base if checkpoint.bare else None)
        detail += f"base model {base}" if base else f"base model not named: --{PART_WORDS[name]}"
    return PartFound(
        name=PART_WORDS[name],
        state=part.state,
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=tuple(sorted({TORCH_NAMES.get(tensor.dtype, tensor.dtype) for tensor in tensors.values()})),
        detail=detail.removesuffix("; "),
    )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    settings = checkpoint.settings
    found: dict[str, Any] = {"feature layer": settings.select_layer, "features": settings.select_strategy}
    if settings.prompt_template is not None:
        found["prompt template"] = str(settings.prompt_template)
    if checkpoint.training is not None and checkpoint.training.pretrained_pth:
        found["stage 1"] = checkpoint.training.pretrained_pth
    text = checkpoint.parts[LLM].config
    if text is not None:
        found["family"] = text.get("model_type")
    return {**found, **checkpoint.facts}


def _problem(source: str | Path, opened: tuple[Checkpoint, str], options: Options, session: Session) -> str | None:
    """Why a target cannot be planned as things are, or None.

    Where the files beside the weights would first have to be made of metadata, or fetched (a tokenizer has megabytes),
    the weights alone are looked at.
    """
    files = opened[0].parts[LLM].files
    try:
        beside = files is None or (files.in_folder and mounted(files.where) is None)
        if beside or TARGETS[options.to].adapters_alone:  # which writes none of them
            lowered(source, options, session, opened)
        else:
            refuse_quantised(assembled(source, options, session, opened).model.recipes)
    except ConvertError as problem:
        return session.called(problem.message + (f" ({problem.hint})" if problem.hint else ""))
    return None
