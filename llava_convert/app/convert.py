"""The whole way: open, map, plan, execute, verify, commit. What the command line and Python callers share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.adapters import refuse_ignored, with_adapters, with_base, with_projector, with_whole_bases
from llava_convert.app.applies import refuse_for_source, refuse_for_target
from llava_convert.app.card import card
from llava_convert.app.card.facts import Facts
from llava_convert.app.documents import Documents
from llava_convert.app.extras import without_extra
from llava_convert.app.facts import fitted, lost_warnings, refuse_lost, unknown_notes
from llava_convert.app.judge import judge
from llava_convert.app.next_step import next_step
from llava_convert.app.options import Options, SourceOptions
from llava_convert.app.session import job_session
from llava_convert.app.stage_one import with_stage_one
from llava_convert.app.verify import Verdict, compare_checkpoints
from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import MismatchError, UnsupportedError, UsageError
from llava_convert.core.flags import AUTO, as_path, options_of
from llava_convert.core.hub_names import is_id
from llava_convert.core.progress import Reporter, Silence
from llava_convert.core.tensors import QUANTS, TORCH_NAMES
from llava_convert.core.text import listed, utf8
from llava_convert.engine.check import check_full, check_quick
from llava_convert.engine.execute import execute
from llava_convert.engine.plan import Plan, make_plan
from llava_convert.engine.record import dropped_texts, record, stored_of
from llava_convert.engine.report import Report, part_story, peak_memory
from llava_convert.engine.run import Outcome
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.info import LAYOUTS, TARGETS
from llava_convert.layouts.registry import Recognised, layout, recognise
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PART_WORDS, PARTS, VISION, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.facts import spelled
from llava_convert.model.options import ALL, DROP, FULL, OFF, OutputOptions, TargetOptions, part_named
from llava_convert.model.quantized import dequantized, refuse_packed
from llava_convert.model.recipe import Bases, Model
from llava_convert.model.reshape import family_named, reshaped
from llava_convert.model.tables.families import architectures
from llava_convert.model.target import KEEP, Target, parse_size
from llava_convert.model.vocabulary import with_rows_for
from llava_convert.ops import kernels
from llava_convert.ops.base import CastLoss
from llava_convert.storage.fingerprints import Snapshot, State
from llava_convert.storage.output.staging import Staging
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.remote.mounts import address_of
from llava_convert.storage.remote.reach import reach, url_of
from llava_convert.storage.remote.session import Session

if TYPE_CHECKING:
    from llava_convert.storage.output.remote_staging import RemoteStaging


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


def convert(source: str | Path, options: Options, say: Reporter | None = None) -> Report:
    """Convert a checkpoint; returns what was done.

    OUT appears whole or not at all. Raises ConvertError, whose `exit_code` says which kind.
    """
    with job_session(options) as session:
        return _convert(_prepared(source, options, session), options, say or Silence(), session)


def plan(source: str | Path, options: Options) -> Report:
    """What `convert` would do; reads headers, writes nothing. Raises what `convert` raises."""
    with job_session(options) as session:
        ready = _prepared(source, options, session)
        return report(ready, options, documents(ready, options), session)


def _prepared(source: str | Path, options: Options, session: Session) -> Prepared:
    """As `prepare`, for one job: an option that has no effect on it is an error."""
    if options.to in TARGETS and not options.shared:
        refuse_for_target(options)
    ready = prepare(source, options, session)
    if not options.shared:
        refuse_for_source(options, ready.checkpoint, ready.model)
    if options.asked is None:
        return ready
    return replace(ready, notes=(f"{options.asked} loads the {options.to} layout: that is made", *ready.notes))


def _convert(ready: Prepared, options: Options, say: Reporter, session: Session) -> Report:
    for text in map(session.called, ready.notes):
        say.note(text)
    for text in map(session.called, ready.warnings):
        say.warn(text)
    if options.resume and options.digest:
        say.note("--digest reads every tensor, so that --resume keeps nothing")
    reads = sorted({extent.path for t in ready.plan.tensors for s in stored_of(t) for extent in s.extents})
    snapshot = _snapshot(ready, reads)
    warnings = list(ready.warnings)
    made = documents(ready, options)
    planned = report(ready, options, made, session)
    with (
        FilePool() as pool,
        _staging(ready, options, planned.bytes_written, _stamp(ready.plan, snapshot), say) as stage,
    ):
        total = sum(t.nbytes for t in ready.plan.tensors)
        outcome = execute(
            ready.plan,
            stage,
            pool,
            threads=options.threads,
            digest=options.digest,
            progress=say.start("converting", total),
        )
        snapshot.recheck()
        if options.level != OFF:
            written = check_quick(ready.plan, stage.path)
            _check_facts(ready, stage.path)
            if options.level == FULL:
                bad = check_full(ready.plan, written, pool, progress=say.start("verifying", total))
                outcome = _with_nonfinite(outcome, bad)
        extra = _nonfinite_warning(outcome)
        if extra:
            say.warn(extra)
            warnings.append(extra)
        if outcome.flushed:
            say.note(f"{outcome.flushed:,} nonzero values became zero in the cast")
        files = stage.contents(ready.plan.sizes) if made.vouches else {}
        for name, data in made.completed(outcome.digests, files).items():
            stage.write_bytes(name, data)
        stage.commit()
    _tell_unchecked(session, say)
    return replace(planned, done=True, flushed=outcome.flushed, warnings=tuple(warnings), fetched=session.fetched)


def _snapshot(ready: Prepared, reads: list[Path]) -> Snapshot:
    """What the files of the job were before the first of them was read, so that the output is of one state of them."""
    checkpoint = ready.checkpoint
    parts = [part.files for part in checkpoint.parts.values() if part.files is not None]
    beside = [checkpoint.beside, *parts, *(base.files for base in ready.model.bases.values())]
    before: dict[Path, State] = {}
    for files in beside:
        before = {**files.before, **before}
    return Snapshot.take(reads, before, [path for files in beside for path in files.was_read()])


def _tell_unchecked(session: Session, say: Reporter) -> None:
    if files := session.unchecked:
        say.note(
            f"read in parts, so not compared with the sha256 in the hub's listing: {listed(files)} "
            "(--cache fetches whole files, and compares)"
        )


def _check_facts(ready: Prepared, staged: Path) -> None:
    """Open what was written as its readers will, and hold what it says against the source, as `verify` does.

    Raises MismatchError (exit 7).
    """
    for theirs in recognise(staged).open_each():
        held = {name for name in PARTS if theirs.parts[name].state != "absent"}
        found = judge(ready.model, ready.target, theirs, held)
        if found.different:
            name, gap = next(iter(found.different.items()))
            raise MismatchError(
                f"what was written says another thing than the source: {name} is {spelled(gap.source)} there, "
                f"{spelled(gap.out)} in the output (and {len(found.different) - 1} more)"
            )
        if theirs.defects:
            raise MismatchError(
                f"the output could not be used as it is: {'; '.join(theirs.defects)}",
                hint="correct the tokenizer and the configs of the source, which say so",
            )


def documents(ready: Prepared, options: Options) -> Documents:
    """README.md and conversion.json of an output that is not yet written.

    Raises InputError for a source that cannot be read.
    """
    name = ready.out.name if options.name is None else options.name
    facts = Facts(ready.plan, ready.target, ready.model, name, ready.options, options.repo)
    return Documents(
        ready.plan,
        utf8(card(facts, verified=options.level)),
        record(
            ready.plan,
            ready.target,
            ready.model,
            options=recorded_options(options),
            verified=options.level,
        ),
        digests=options.digest,
        vouches=options.level == FULL,  # so that who passes the output on can prove that it is what was verified
    )


def _staging(ready: Prepared, options: Options, needed: int, stamp: str, say: Reporter) -> Staging | RemoteStaging:
    """Where the output is built, by where it goes."""
    resume = options.resume and not options.digest  # taken while a shard is written: kept ones would have none
    url = url_of(ready.out)
    if url is not None:
        from llava_convert.storage.output.remote_staging import RemoteStaging  # fsspec is for those who need it

        largest = max(sum(shard.size for shard in batch) for batch in ready.plan.batches)
        return RemoteStaging(url, stamp, force=options.force, resume=resume, needed_bytes=largest, say=say.note)
    reads = [
        ready.checkpoint.root if ready.checkpoint.path.is_dir() else ready.checkpoint.path,
        *(base.folder for base in ready.model.bases.values()),
    ]
    return Staging(
        ready.out,
        stamp,
        force=options.force,
        resume=resume,
        needed_bytes=needed,
        reads=reads,
        say=say.note,
        warn=say.warn,
    )


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
    checkpoint, why, told = _open(opened, options, session, options.to)
    if is_already(checkpoint, options):
        raise UnsupportedError(
            f"{checkpoint.path} is already {options.to} layout",
            hint=f"give {_changes(options.to)} to change it within its layout",
        )
    part = _part(options.target.part)
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
    bases = _unused(options.bases, checkpoint)
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


def _unused(bases: Bases, checkpoint: Checkpoint) -> Bases:
    """What is asked of bases, less what the source was laid over as a whole."""
    used = {layer.asked for layer in checkpoint.layers}
    return replace(bases, llm=None) if bases.llm in used else bases


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


def prepare(
    source: str | Path, options: Options, session: Session, opened: tuple[Checkpoint, str] | None = None
) -> Prepared:
    """Open the source and plan the conversion; writes nothing, reads headers only."""
    found = assembled(source, options, session, opened)
    checkpoint, model = found.checkpoint, found.model
    target = layout(options.to).lower(model, found.target)
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


def _kernels(target: Target) -> dict[str, str]:
    """Whose kernels quantise, where any do: they decide the bytes."""
    quantises = any(o.dtype in QUANTS and o.recipe.dtype != o.dtype for files in target.sets for o in files.outputs)
    return {"kernels": kernels.kernels()} if quantises else {}


def _out(checkpoint: Checkpoint, options: Options, session: Session) -> Path:
    return as_path(options.out) or Path(f"{_stem(checkpoint.path, session)}_{options.to}")


def open_source(
    source: str | Path, options: SourceOptions, session: Session, *, dequantize: bool = False
) -> tuple[Checkpoint, str]:
    """The source by its headers, and why it was taken for what it is."""
    found = recognised(source, options, session)
    return found.open(_open_options(options, session, dequantize)), found.why


def _open_options(options: SourceOptions, session: Session, dequantize: bool) -> OpenOptions:
    mmproj = None if options.mmproj is None else reach(options.mmproj, session, cache=options.bases.cache)
    return OpenOptions(as_path(options.config), dequantize, mmproj)


def recognised(source: str | Path, options: SourceOptions, session: Session) -> Recognised:
    """The source, looked at. Raises what `recognise` and `reach` raise."""
    path = reach(source, session, cache=options.bases.cache)
    return recognise(path, options.source_layout, _config_from(options, session))


def _config_from(options: SourceOptions, session: Session) -> Path | None:
    """The folder that `--config-from` names, for weights without a config."""
    return None if options.config_from is None else reach(options.config_from, session, cache=options.bases.cache)


def open_whole(
    source: str | Path, options: SourceOptions, session: Session, *, dequantize: bool = False
) -> tuple[Checkpoint, list[str]]:
    """The source with its adapters and its stage 1, and what there is to tell of the latter."""
    checkpoint, _, told = _open(open_source(source, options, session, dequantize=dequantize), options, session)
    return checkpoint, told


def _open(
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


def _asked_ids(options: Options) -> dict[str, str]:
    named = {p: i for p in (LLM, VISION) if (i := options.bases.asked_id(p)) is not None}
    return named | ({ALL: options.base} if options.base is not None and is_id(options.base) else {})


def _stamp(plan: Plan, snapshot: Snapshot) -> str:
    """What a resumed run must have in common with the killed one: the plan, and sources that nobody touched since."""
    states = [
        [address_of(path) or str(path), s.size, s.mtime_ns, s.inode, s.version] for path, s in snapshot.states.items()
    ]
    return hashlib.sha256(json.dumps([plan.hash, states]).encode()).hexdigest()


def _check_options(options: Options) -> None:
    """Refuse what no source or target could make right, whichever of them would look at it."""
    if options.out is not None:
        url_of(Path(options.out))  # which refuses a hub
    if options.target.max_shard_size not in (None, KEEP):
        parse_size(options.target.max_shard_size)
    if options.threads < 0:
        raise UsageError(f"--threads {options.threads}: a count, or 0 for one a core")
    if options.digest and find_spec("xxhash") is None:
        raise UsageError("--digest needs xxhash, which is not installed", hint="pip install 'llava-convert[digest]'")


def report(ready: Prepared, options: Options, made: Documents, session: Session) -> Report:
    """The report of a plan that is not (yet) run."""
    plan, model = ready.plan, ready.model
    dtypes = {t.dtype for t in plan.tensors if t.canonical.startswith(LLM)} or {t.dtype for t in plan.tensors}
    out = url_of(ready.out) or ready.out
    facts = Facts(plan, ready.target, model, str(out), ready.options, None)
    source = session.address_of(ready.checkpoint.path)
    return Report(
        source=source,
        out=out,
        layouts=(ready.checkpoint.layout, options.to),
        why=ready.why,
        plan=plan,
        documents=made.sizes,
        next=next_step(facts, str(source), options, here=isinstance(out, Path)),
        dtype=", ".join(sorted(TORCH_NAMES.get(d, d) for d in dtypes)),
        source_dtype=_source_dtype(plan),
        notes=tuple(map(session.called, ready.notes)),
        warnings=tuple(map(session.called, ready.warnings)),
        verified=options.level,
        done=False,
        memory=peak_memory(plan),
        parts={PART_WORDS[part]: part_story(model, plan, part) for part in PARTS},
        fetched=session.fetched,
        dropped=(*ready.checkpoint.dropped, *model.dropped),
        unchecked=session.unchecked,
    )


def _source_dtype(plan: Plan) -> str:
    """The dtype of most bytes of the language model as stored; of all weights where there is none."""
    pieces = [piece for tensor in plan.tensors for piece in tensor.pieces]
    sizes: Counter[str] = Counter()
    for piece in [p for p in pieces if p.canonical.startswith(LLM)] or pieces:
        sizes[piece.source.dtype] += piece.source.nbytes
    return TORCH_NAMES.get(most := sizes.most_common(1)[0][0], most) if sizes else ""


def _part(word: str) -> str:
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


def _stem(path: Path, session: Session) -> str:
    name = session.name_of(path)
    return name.removesuffix(path.suffix) if path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".gguf") else name


def recorded_options(options: Options) -> dict[str, Any]:
    """What conversion.json says of the options that shape the output: each that was given, and five in any case.

    Paths stay out: no such option is one.
    """
    defaults = {"dtype": AUTO, "max_shard_size": AUTO, "part": None, "prompt_template": None, "image_processor": "clip"}
    target = options.target
    found = options_of(OutputOptions).values()
    given = {option.spelling.strip("-").replace("-", "_"): getattr(target, option.name) for option in found}
    return defaults | {name: value for name, value in given.items() if value is not None} | {"part": target.part}


def _with_nonfinite(outcome: Outcome, found: Mapping[str, int]) -> Outcome:
    for name, count in found.items():
        if name not in outcome.losses:
            outcome.losses[name] = CastLoss(nonfinite=count)
    return outcome


def _nonfinite_warning(outcome: Outcome) -> str | None:
    bad = outcome.nonfinite
    if not bad:
        return None
    name = max(bad, key=lambda n: bad[n])
    return f"{sum(bad.values()):,} NaN or infinite values in {len(bad)} tensors, kept as they are (most in {name})"


def verify(
    source: str | Path,
    out: str | Path,
    options: SourceOptions | None = None,
    say: Reporter | None = None,
    *,
    part: str = ALL,
) -> Verdict:
    """Compare OUT with SOURCE, tensor by tensor; the caller decides what a difference means."""
    say = say or Silence()
    with job_session(options) as session:
        return _verify(source, out, options or SourceOptions(), say, _part(part), session)


def _verify(
    source: str | Path, theirs: str | Path, options: SourceOptions, say: Reporter, part: str, session: Session
) -> Verdict:
    found = recognised(source, options, session)
    out = reach(theirs, session, cache=options.bases.cache)
    other = recognise(out, None, _config_from(options, session) if out.is_file() else None)
    # In another layout quantised weights have become floats.
    opened = found.open(_open_options(options, session, found.layout != other.layout)), found.why
    checkpoint, _, told = _open(opened, options, session, other.layout)
    checkpoint = without_extra(checkpoint, part if part != ALL else checkpoint.default_part, options.extra)
    for text in map(session.called, told):
        say.warn(text)
    total = out.stat().st_size if out.is_file() else sum(p.stat().st_size for p in out.rglob("*"))
    target = TargetOptions(part=part, lora_alpha=options.bases.lora_alpha)
    verdict = compare_checkpoints(
        checkpoint,
        other.open_each(),
        session,
        bases=with_whole_bases(_unused(options.bases, checkpoint), options, session),
        options=target,
        vocab=options.vocab,
        progress=say.start("comparing", total),
    )
    _tell_unchecked(session, say)
    return replace(
        verdict,
        source=session.called(checkpoint.path),
        out=session.called(out),
        notes=tuple(map(session.called, verdict.notes)),
        defects=tuple(map(session.called, verdict.defects)),
    )
