"""What a source is laid over, and what is laid over it: its base, and adapters of whichever trainer.

An adapter beside a whole model is merged where it is asked for, and never left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llava_convert.app.options import SourceOptions
from llava_convert.core.errors import ConvertError, InputError, UnsupportedError, UsageError
from llava_convert.core.hub_names import is_id, last_name, parse
from llava_convert.layouts.adapter_folder import ADAPTER_CONFIG, STEM
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.registry import Recognised, as_adapter, recognise
from llava_convert.model.bases import Base, find_base, local_base
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, PARTS, PROJECTOR, VISION, Checkpoint, Layer
from llava_convert.model.layers import laid_over, with_adapter
from llava_convert.model.recipe import Bases, Model
from llava_convert.model.tables.facts import CONFIG
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.towers import tower_config
from llava_convert.storage.remote.reach import on_hub, reach
from llava_convert.storage.remote.session import Session

NONE = "none"
_FILES = (ADAPTER_CONFIG, f"{STEM}.safetensors", f"{STEM}.bin")
_DEEPEST = 8  # a training that began with what a training left, and so on


def beside(folder: Path) -> str | None:
    """The adapter file that lies in a folder, None where there is none."""
    return next((name for name in _FILES if (folder / name).is_file()), None)


def with_base(checkpoint: Checkpoint, options: SourceOptions, session: Session, *, depth: int = 0) -> Checkpoint:
    """The checkpoint laid over the whole model that it was trained from, where it is not whole by itself.

    The model is named by `--base`; else, of a source that names one, by `--llm` or by the source. One that is no LLaVA
    stays a base of one part. Raises InputError (exit 3) where what is needed cannot be had, UsageError where `--base`
    has no use.
    """
    if checkpoint.bare and NONE in options.adapters:
        raise UsageError(
            f"--adapter {NONE} does not apply: {checkpoint.path.name} is an adapter itself",
            hint="leave it out, or convert the base model",
        )
    given = options.base or (options.llm if checkpoint.base is not None else None)
    asked = given or checkpoint.base
    if asked is None:
        if checkpoint.bare:
            raise InputError(
                f"{checkpoint.path} is an adapter that does not name its base model", hint="give the LLaVA by --base"
            )
        return checkpoint
    if options.base is not None and all(checkpoint.parts[part].state == "full" for part in PARTS):
        raise UsageError(
            f"--base does not apply: {checkpoint.path.name} is a whole model", hint="leave it out: it is for adapters"
        )
    if depth > _DEEPEST:
        raise InputError(f"{checkpoint.path}: its base has a base, and so on, more than {_DEEPEST} deep")
    needed = checkpoint.bare or options.base is not None
    try:
        found = _recognised(asked, checkpoint, options, session, explicit=given is not None)
        if found.alone and not needed:
            return checkpoint  # a language model alone: `assemble` takes it for that part
        opened = session.once((Recognised, found.found.path), lambda: found.open(OpenOptions()))
    except ConvertError:
        if not needed:
            return checkpoint  # said where it turns out to be needed
        raise
    plain = SourceOptions(cache=options.cache)
    base = _with_places(with_base(opened, plain, session, depth=depth + 1))
    made = laid_over(checkpoint, base, asked)
    if not checkpoint.bare and checkpoint.parts[PROJECTOR].state == "absent" and base.parts[PROJECTOR].weights:
        told = (
            f"{checkpoint.path.name} has no projector, and that of its base is taken; if one was trained along, "
            "--projector gives it"
        )
        made = replace(made, warnings=(*made.warnings, told))
    if given is not None and checkpoint.base is not None and _other(given, checkpoint.base):
        told = (
            f"the adapter was trained on {checkpoint.base}, and the base given is {given}: if they are not the same "
            "model, the output is neither"
        )
        made = replace(made, warnings=(*made.warnings, told))
    return made


def _with_places(base: Checkpoint) -> Checkpoint:
    """A base that names bases of its parts by folders around it: by where those are, seen from anywhere."""
    for name in (LLM, VISION):
        part = base.parts[name]
        place = local_base(part.base, base.path, explicit=False) if part.base is not None else None
        if place is not None:
            base = base.with_part(name, replace(part, base=str(place)))
    return base


def with_projector(checkpoint: Checkpoint, options: SourceOptions, session: Session) -> Checkpoint:
    """The checkpoint with the projector that `--projector` names.

    Raises UsageError where it has one itself, InputError where what is named has none.
    """
    if options.projector is None:
        return checkpoint
    own = checkpoint.parts[PROJECTOR]
    # Training with `lora_bias all` saves the biases beside the adapter, and the weights at its end alone.
    if own.adapters or any(name.endswith(".weight") for name in own.weights):
        raise UsageError(f"--projector does not apply: {checkpoint.path.name} has a projector", hint="leave it out")
    found = recognise(reach(options.projector, session, cache=options.cache)).open(OpenOptions())
    part = found.parts[PROJECTOR]
    if not part.weights:
        raise InputError(
            f"{options.projector} holds no projector", hint="give mm_projector.bin, or a LLaVA, by --projector"
        )
    return replace(
        checkpoint.with_part(PROJECTOR, replace(part, weights={**part.weights, **own.weights})),
        image_newline=checkpoint.image_newline or found.image_newline,
        layers=(*checkpoint.layers, Layer("projector", str(options.projector), found.root, found.files)),
    )


def _other(given: str, named: str) -> bool:
    return last_name(given).lower() != last_name(named).lower()


def _recognised(
    asked: str, checkpoint: Checkpoint, options: SourceOptions, session: Session, *, explicit: bool
) -> Recognised:
    path = local_base(asked, checkpoint.path, explicit=explicit)
    if path is None:
        address = parse(asked)
        if address is None or not is_id(asked):
            raise InputError(
                f"the base {asked!r} of {checkpoint.path.name} was not found"
                + ("" if explicit else " in the current folder, nor in those above the source"),
                hint="give the model that it was trained on by --base: a folder, a file or a hub id",
            )
        try:
            path = on_hub(address, session, cache=options.cache)
        except ConvertError as problem:
            raise InputError(
                f"the base {asked!r} of {checkpoint.path.name} was not found: it is not a folder here, not in the "
                f"hub's cache, and the hub gave an error ({problem.message})",
                hint="name its folder: --base PATH",
            ) from problem
    return recognise(path)


def with_whole_bases(bases: Bases, options: SourceOptions, session: Session) -> Bases:
    """The bases of single parts, those opened that are whole LLaVAs, of whichever layout: the part is taken of them.

    Raises InputError (exit 3) for one that lacks the part.
    """
    given: dict[str, Base] = {}
    for part in (LLM, VISION):
        asked = bases.asked(part)
        if asked is None:
            continue
        path = local_base(asked, Path(), explicit=True)
        address = parse(asked) if path is None and is_id(asked) else None
        try:
            if address is not None:  # its config first, which may lie alone in the hub's cache
                path = on_hub(address, session, weights=False, cache=bases.cache)
            if path is None or _is_part(part, path, asked, session, cache=bases.cache):
                continue
            if address is not None:
                path = on_hub(address, session, cache=bases.cache)
            found = recognise(path)
        except ConvertError:
            continue  # said where it is read as the part alone
        if found.alone:
            continue
        opened = with_base(found.open(OpenOptions()), SourceOptions(cache=options.cache), session)
        held = opened.parts[part]
        config = held.config or (tower_config(held.weights, None) if part == VISION and held.weights else None)
        if held.state != "full" or config is None:
            raise InputError(
                f"{asked} is a LLaVA of the {opened.layout} layout that holds no whole {PART_NAMES[part]}"
                + (" of which a config tells" if held.state == "full" else ""),
                hint=f"give one that does by --{PART_WORDS[part]}",
            )
        files = held.files or opened.beside
        given[part] = Base(
            part,
            path if path.is_dir() else path.parent,
            asked,
            address is not None,
            files,
            held=replace(held, config=config),
        )
    return replace(bases, given=given) if given else bases


def _is_part(part: str, path: Path, asked: str, session: Session, *, cache: bool) -> bool:
    """Whether a folder's config.json is that of the part alone, which `assemble` then reads; it is read once."""
    if not (path / CONFIG).is_file():
        return False
    files = find_base(part, asked, Path(), session, explicit=True, weights=False, cache=cache).files
    kind = files.read_object(CONFIG).get("model_type")
    return known_architecture(part, kind) is not None


def with_adapters(checkpoint: Checkpoint, asked: Iterable[str], session: Session) -> Checkpoint:
    """The checkpoint with these adapters on top, in order; `none` stands for leaving out those that lie beside it.

    Raises UsageError for `none` among others, InputError for what is no adapter, UnsupportedError (exit 4) for tensors
    that the model has no module for.
    """
    names = list(asked)
    if NONE in names and len(names) > 1:
        raise UsageError("--adapter none stands alone", hint="leave it out, or the adapters")
    for name in names if NONE not in names else ():
        top = as_adapter(reach(name, session)).open(OpenOptions())
        if not any(part.adapters for part in top.parts.values()):
            raise InputError(
                f"{name} holds no adapter ({', '.join(_FILES[1:])})",
                hint="give an adapter's folder; in `llava-convert merge BASE ADAPTER` the base comes first",
            )
        checkpoint = with_adapter(checkpoint, top, name)
    return checkpoint


def refuse_ignored(model: Model, asked: Iterable[str]) -> None:
    """Raise UnsupportedError (exit 4) for an adapter beside weights that are used, of which nobody said what to do."""
    if tuple(asked):
        return
    for part, folder in _folders(model):
        name = beside(folder)
        if name is not None:
            raise UnsupportedError(
                f"{folder}: {name} lies beside a whole {PART_NAMES[part]}, and transformers with peft would load both",
                hint=f"--adapter {folder} merges it, --adapter {NONE} leaves it out",
            )


def ignored_note(checkpoint: Checkpoint) -> str | None:
    """For `inspect`: the adapter that lies beside a whole model."""
    name = beside(checkpoint.root) if checkpoint.parts[LLM].state == "full" and checkpoint.path.is_dir() else None
    if name is None:
        return None
    return f"{name} lies beside the model: --adapter {checkpoint.root} merges it, --adapter {NONE} leaves it out"


def _folders(model: Model) -> Iterable[tuple[str, Path]]:
    """Where whole weights come from: the source's own folder or that of its base, and those of base models."""
    checkpoint = model.checkpoint
    if checkpoint.parts[LLM].state == "full":
        below = [layer for layer in checkpoint.layers if layer.role == "base"]
        # A base may be an adapter over a base of its own, and is merged then.
        whole = [layer.root for layer in below if not any(file.name in _FILES for file in layer.files)]
        yield from ((LLM, root) for root in (whole if below else [checkpoint.root] * checkpoint.path.is_dir()))
    for part, base in model.bases.items():
        if any(r.origin == "base" for r in model.part(part).values()):
            yield part, base.folder
