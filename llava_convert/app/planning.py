"""Plan a conversion: the source made whole, lowered to a target; every byte of the output is known then."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from llava_convert.app.adapters import refuse_ignored, with_whole_bases
from llava_convert.app.extras import without_extra
from llava_convert.app.facts import fitted, lost_warnings, refuse_lost, unknown_notes
from llava_convert.app.options import Options
from llava_convert.app.source import bases_left, made_whole, open_source
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.core.flags import as_path, options_of
from llava_convert.core.hub_names import is_id
from llava_convert.core.tensors import QUANTS
from llava_convert.core.text import utf8
from llava_convert.core.values import dataclass
from llava_convert.engine.plan import Plan, make_plan
from llava_convert.engine.record import dropped_texts
from llava_convert.layouts.info import LAYOUTS, TARGETS
from llava_convert.layouts.registry import layout
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PART_WORDS, VISION, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.options import ALL, DROP, OutputOptions, TargetOptions, part_named
from llava_convert.model.quantized import dequantized, refuse_packed
from llava_convert.model.recipe import Model
from llava_convert.model.reshape import family_named, reshaped
from llava_convert.model.tables.families import architectures
from llava_convert.model.target import KEEP, Target, parse_size
from llava_convert.model.vocabulary import with_rows_for
from llava_convert.ops import kernels
from llava_convert.storage.remote.reach import url_of
from llava_convert.storage.remote.session import Session


@dataclass(frozen=True)
class Prepared:
    """A conversion that is planned and not yet run; `options` are those that its target was made with."""

    checkpoint: Checkpoint
    why: str
    model: Model
    options: TargetOptions
    target: Target
    plan: Plan
    out: Path
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def prepare(
    source: str | Path, options: Options, session: Session, opened: tuple[Checkpoint, str] | None = None
) -> Prepared:
    """Open the source and plan the conversion; writes nothing, reads headers only."""
    found, target = lowered(source, options, session, opened)
    checkpoint, model = found.checkpoint, found.model
    tags = {"from": checkpoint.layout, "to": options.to, "digest": options.digest}
    plan = make_plan(target, tags=tags | _kernels(target))
    out = _out(checkpoint, options, session)
    return Prepared(
        checkpoint,
        found.why,
        model,
        found.target,
        target,
        plan,
        out,
        notes=(
            *checkpoint.notes,
            *model.notes,
            *unknown_notes(model),
            *target.notes,
            *dropped_texts(checkpoint, model.dropped),
        ),
        warnings=(*checkpoint.warnings, *model.warnings, *lost_warnings(model, options.to), *target.warnings),
    )


def lowered(
    source: str | Path, options: Options, session: Session, opened: tuple[Checkpoint, str] | None = None
) -> tuple[Assembled, Target]:
    """As `prepare`, up to what the target is; no file is laid out. All that is refused has been by then."""
    found = assembled(source, options, session, opened)
    return found, layout(options.to).lower(found.model, found.target)


@dataclass(frozen=True)
class Assembled:
    """A source that was opened and made whole, as far as a target needs it."""

    checkpoint: Checkpoint
    why: str
    model: Model
    target: TargetOptions


def assembled(
    source: str | Path, options: Options, session: Session, opened: tuple[Checkpoint, str] | None = None
) -> Assembled:
    """What a conversion starts from; `opened` is the source where it has been opened already. Reads headers only."""
    if options.to not in TARGETS:
        raise UsageError(f"--to {options.to}: this version writes {', '.join(TARGETS)}")
    _check_options(options)
    if TARGETS[options.to].adapters_alone and options.base is not None and not is_id(options.base):
        raise UsageError(
            f"--base {options.base} does not apply: an adapter holds the name of its base alone",
            hint="give the hub id that the adapter is to name, or leave it out",
        )
    opened = opened or open_source(source, options, session, dequantize=options.dequantize)
    checkpoint, why, told = made_whole(opened, options, session, options.to)
    if is_already(checkpoint, options):
        raise UnsupportedError(
            f"{checkpoint.path} is already {options.to} layout",
            hint=f"give {_changes(options.to)} to change it within its layout",
        )
    part = part_asked(options.target.part)
    if part == ALL:
        part = checkpoint.default_part
    target_options = replace(
        options.target,
        part=part,
        name=utf8(options.name or _out(checkpoint, options, session).name).decode(),
        ids=_asked_ids(options),
        lora_alpha=options.bases.lora_alpha,
    )
    checkpoint = without_extra(checkpoint, part, options.extra)
    need = layout(options.to).needs(checkpoint, part)
    if options.dequantize:
        checkpoint = dequantized(checkpoint)
    refuse_packed(checkpoint, need.weights)
    bases = bases_left(options.bases, checkpoint)
    model = assemble(
        checkpoint,
        with_whole_bases(bases, options, session),
        session,
        weights=need.weights,
        configs=need.configs,
        optional_configs=need.optional_configs,
        vocab=options.vocab,
    )
    if checkpoint.vocabulary_layout != options.to and not need.keep_added:
        model = without_added(model)
    if options.vocab is not None and (tokenizer := Artefacts(model, target_options).tokenizer) is not None:
        model = with_rows_for(model, tokenizer.size, options.vocab)
    refuse_ignored(model, options.adapters)
    refuse_lost(model, options.to, part, options.allowed_keys)
    model = fitted(model, options.to)
    if options.target.as_family is not None:
        model = _as_family(model, options)
    elif model.part(LLM) and (other := family(LLM, model.configs[LLM]).written_as.get(options.to)) is not None:
        model = reshaped(model, architectures()[other])
    return Assembled(checkpoint, why, replace(model, warnings=(*told, *model.warnings)), target_options)


def _changes(layout: str) -> str:
    """The options that change an output within its layout."""
    found = [option.spelling for name, option in options_of(OutputOptions).items() if name in TARGETS[layout].options]
    return f"{', '.join(found)} or --part"


def _as_family(model: Model, options: Options) -> Model:
    """The model with its language model in the shape of another family, as --as says."""
    other = family_named(str(options.target.as_family))
    if not model.part(LLM):
        if model.checkpoint.parts[LLM].adapter is not None:
            raise UnsupportedError(
                f"--as {other.name}: the {options.to} layout keeps the language model's LoRA, which fits its own base",
                hint="convert to official, hf or gguf, where the LoRA is merged",
            )
        raise UsageError(f"--as {other.name} does not apply: no language model is written", hint="leave it out")
    if family(LLM, model.configs[LLM]) is not other:
        return reshaped(model, other)
    if options.shared:
        return model
    raise UsageError(f"--as {other.name} does not apply: the language model is one already", hint="leave it out")


def _check_options(options: Options) -> None:
    """Refuse what no source or target could make right, whichever of them would look at it."""
    if options.out is not None:
        url_of(Path(options.out))  # which refuses a hub
    if options.target.max_shard_size not in (None, KEEP):
        parse_size(options.target.max_shard_size)
    if options.chat_template is not None and options.prompt_template is not None:
        raise UsageError(
            "--chat-template and --prompt-template both say how the model is prompted",
            hint="leave one out: --prompt-template takes a name, --chat-template a Jinja file",
        )
    if options.stop is not None and not options.stops:
        raise UsageError("--stop names no token", hint="give a token or its id, or several with commas between")
    if options.threads < 0:
        raise UsageError(f"--threads {options.threads}: a count, or 0 for one a core")
    if options.digest and find_spec("xxhash") is None:
        raise UsageError("--digest needs xxhash, which is not installed", hint="pip install 'llava-convert[digest]'")


def _asked_ids(options: Options) -> dict[str, str]:
    named = {p: i for p in (LLM, VISION) if (i := options.bases.asked_id(p)) is not None}
    return named | ({ALL: options.base} if options.base is not None and is_id(options.base) else {})


def part_asked(word: str) -> str:
    part = part_named(word)
    if part is None:
        raise UsageError(f"--part {word}: it is all, {', '.join(PART_WORDS.values())}")
    return part


def is_already(checkpoint: Checkpoint, options: Options) -> bool:
    """Whether a checkpoint is already what is asked for; one that is an adapter or a projector alone is not."""
    changed = options.dequantize or options.extra == DROP or options.vocab is not None
    if checkpoint.layout != options.to or not checkpoint.as_written or changed:
        return False
    partial = not LAYOUTS[options.to].leaves_out_frozen and checkpoint.parts[LLM].state != "full"
    partial = partial or bool(checkpoint.layers)  # laid over another, or another over it
    return options.target == TargetOptions() and not partial


def _out(checkpoint: Checkpoint, options: Options, session: Session) -> Path:
    return as_path(options.out) or Path(f"{_stem(checkpoint.path, session)}_{options.to}")


def _stem(path: Path, session: Session) -> str:
    name = session.name_of(path)
    return name.removesuffix(path.suffix) if path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".gguf") else name


def _kernels(target: Target) -> dict[str, str]:
    """Whose kernels quantise, where any do: they decide the bytes."""
    quantises = any(o.dtype in QUANTS and o.recipe.dtype != o.dtype for files in target.sets for o in files.outputs)
    return {"kernels": kernels.kernels()} if quantises else {}
