"""Run a conversion: plan, stage, execute, verify, commit. What the command line and Python callers share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app import delta
from llava_convert.app.applies import refuse_for_source, refuse_for_target
from llava_convert.app.card import card
from llava_convert.app.card.facts import Facts
from llava_convert.app.documents import Documents
from llava_convert.app.judge import judge
from llava_convert.app.next_step import next_step, typed
from llava_convert.app.options import Options
from llava_convert.app.planning import Prepared, prepare
from llava_convert.app.session import job_session, tell_unchecked
from llava_convert.core.errors import MismatchError
from llava_convert.core.flags import AUTO, options_of
from llava_convert.core.progress import Reporter, Silence, names_files, stage
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import utf8
from llava_convert.engine.check import check_full, check_headers, check_quick
from llava_convert.engine.estimate import seconds
from llava_convert.engine.execute import execute, thread_count
from llava_convert.engine.plan import Plan, shard_hash
from llava_convert.engine.record import record, stored_of
from llava_convert.engine.report import Report, part_story, peak_memory
from llava_convert.engine.run import Outcome
from llava_convert.engine.shards import Shard
from llava_convert.layouts.info import TARGETS
from llava_convert.layouts.registry import recognise
from llava_convert.model.checkpoint import LLM, PART_WORDS, PARTS
from llava_convert.model.facts import spelled
from llava_convert.model.options import FULL, OFF, OutputOptions
from llava_convert.ops.base import CastLoss
from llava_convert.storage.fingerprints import Snapshot, State
from llava_convert.storage.output.places import free_bytes
from llava_convert.storage.output.staging import Staging, Twin
from llava_convert.storage.ranges import FilePool, worth_keeping
from llava_convert.storage.remote.mounts import address_of, remote_of
from llava_convert.storage.remote.reach import url_of
from llava_convert.storage.remote.session import Session

if TYPE_CHECKING:
    from llava_convert.storage.output.remote_staging import RemoteStaging


def convert(source: str | Path, options: Options, say: Reporter | None = None) -> Report:
    """Convert a checkpoint, or write one share of its files; returns what was done.

    OUT appears whole or not at all. Raises ConvertError, whose `exit_code` says which kind.
    """
    with job_session(options) as session:
        say = say or Silence()
        stage(say, "opening")
        return write(prepared(source, options, session), options, say, session)


def write_files(source: str | Path, options: Options, names: Collection[str]) -> Report:
    """Write these files of the output alone, as a share of it; what is there already stays. Raises as `convert`."""
    with job_session(options) as session:
        return write(prepared(source, options, session), options, Silence(), session, names=names)


def stamps(ready: Prepared) -> tuple[str, dict[str, str]]:
    """What the output would be made of: a stamp of all of it, and of each file with weights. Raises InputError."""
    snapshot = _snapshot(ready, _reads(ready.plan.shards))
    files = {one.name: _stamp(shard_hash(one), snapshot, _reads([one])) for one in ready.plan.shards}
    return _stamp(ready.plan.hash, snapshot), files


def plan(source: str | Path, options: Options) -> Report:
    """What `convert` would do; reads headers, writes nothing. Raises what `convert` raises."""
    with job_session(options) as session:
        ready = prepared(source, options, session)
        return report(ready, options, documents(ready, options), session)


def prepared(source: str | Path, options: Options, session: Session) -> Prepared:
    """As `prepare`, for one job: an option that has no effect on it is an error."""
    if options.to in TARGETS and not options.shared:
        refuse_for_target(options)
    ready = prepare(source, options, session)
    if not options.shared:
        refuse_for_source(options, ready.checkpoint, ready.model)
    if options.asked is None:
        return ready
    return replace(ready, notes=(f"converting to {options.to}, the layout that {options.asked} loads", *ready.notes))


def write(
    ready: Prepared,
    options: Options,
    say: Reporter,
    session: Session,
    *,
    names: Collection[str] | None = None,
    twins: Mapping[str, Twin] | None = None,
) -> Report:
    """Write what was planned; of its files with weights those called `names` alone, where that is given.

    `twins` are files that hold what some will: these are copied. Raises as `convert`.
    """
    for text in map(session.called, ready.notes):
        say.note(text)
    for text in map(session.called, ready.warnings):
        say.warn(text)
    snapshot = _snapshot(ready, _reads(ready.plan.shards))
    made = documents(ready, options)
    planned = report(ready, options, made, session)
    if names is not None:
        planned = replace(planned, share=tuple(names))
    with FilePool() as pool, _staging(ready, options, planned, _stamp(ready.plan.hash, snapshot), say) as staged:
        for name, twin in (twins or {}).items():
            if not staged.finished(name):
                stage(say, "copying from an earlier step")
                staged.adopt(name, twin)
        left = [shard for shard in _written(planned) if not staged.finished(shard.name)]
        doubt = delta.doubt(ready.model, pool) if left else None  # a run that is taken up reads what it needs alone
        if doubt is not None:
            say.warn(session.called(doubt))
        outcome = execute(
            ready.plan,
            staged,
            pool,
            names=planned.share,
            threads=options.threads,
            digest=options.digest,
            keep=_read_again(ready, options) or worth_keeping(sum(shard.size for shard in left)),
            progress=say.start("converting", sum(t.nbytes for shard in _written(planned) for t in shard.tensors)),
            on_file=names_files(say),
        )
        stage(say, "checking")
        snapshot.recheck()
        _verify(ready, options, planned, staged, pool, outcome, say)
        nonfinite = _nonfinite_warning(outcome)
        if nonfinite is not None:
            say.warn(nonfinite)
        if outcome.flushed:
            say.note(f"{outcome.flushed:,} nonzero values became zero in the cast")
        stage(say, "finishing")
        digests = staged.known
        if planned.share is not None:
            for name in planned.share:
                staged.tell(name, {**outcome.of(name), "verified": options.level})
            staged.settle()
        else:
            if made.vouches:
                digests = staged.digests(ready.plan.sizes)
            contents = {name: one.as_json() for name, one in digests.items()}
            for name, data in made.completed(outcome.digests, contents).items():
                staged.write_bytes(name, data)
            staged.commit()
    tell_unchecked(session, say)
    return replace(
        planned,
        done=planned.share is None,
        flushed=outcome.flushed,
        warnings=(*ready.warnings, *filter(None, (doubt, nonfinite))),
        fetched=session.fetched,
        digests=digests,
    )


def _written(planned: Report) -> list[Shard]:
    """The shards that this run writes."""
    return [shard for shard in planned.plan.shards if planned.share is None or shard.name in planned.share]


def _read_again(ready: Prepared, options: Options) -> bool:
    """Whether this job itself reads what it writes: to compare it with its source, or to send it to a store."""
    return options.level == FULL or url_of(ready.out) is not None


def _verify(
    ready: Prepared,
    options: Options,
    planned: Report,
    staged: Staging | RemoteStaging,
    pool: FilePool,
    outcome: Outcome,
    say: Reporter,
) -> None:
    """Hold what was written against the plan, as far as is asked. Raises MismatchError (exit 7).

    What a share was verified by, the run that finishes need not do again.
    """
    if options.level == OFF:
        return
    shards = _written(planned)
    if planned.share is None:
        check_quick(ready.plan, staged.path)
        _check_facts(ready, staged.path)
    else:
        check_headers(shards, staged.path)
    if options.level != FULL:
        return
    left = [shard for shard in shards if staged.found.get(shard.name, {}).get("verified") != FULL]
    done = say.start("verifying", sum(tensor.nbytes for shard in left for tensor in shard.tensors))
    for key, count in check_full(left, staged.path, pool, progress=done, on_file=names_files(say)).items():
        outcome.losses.setdefault(key, CastLoss(nonfinite=count))


def _reads(shards: Iterable[Shard]) -> list[Path]:
    """The files that shards are made of."""
    return sorted({path for shard in shards for t in shard.tensors for s in stored_of(t) for path in s.paths})


def _snapshot(ready: Prepared, reads: list[Path]) -> Snapshot:
    """What the files of the job were before the first of them was read, so that the output is of one state of them."""
    checkpoint = ready.checkpoint
    parts = [part.files for part in checkpoint.parts.values() if part.files is not None]
    beside = [checkpoint.beside, *parts, *(base.files for base in ready.model.bases.values())]
    before: dict[Path, State] = {}
    for files in beside:
        before = {**files.before, **before}
    return Snapshot.take(reads, before, [path for files in beside for path in files.was_read()])


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
                f"the output differs from the source: {name} is {spelled(gap.source)} in the source, "
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


def _staging(ready: Prepared, options: Options, planned: Report, stamp: str, say: Reporter) -> Staging | RemoteStaging:
    """Where the output is built, by where it goes, and by whether others build at it, too."""
    resume = options.resume or options.finish
    needs = [shard.name for shard in ready.plan.shards] if options.finish else []
    url = url_of(ready.out)
    if url is not None:
        from llava_convert.storage.output.remote_staging import RemoteStaging  # fsspec is for those who need it

        largest = max(sum(shard.size for shard in batch) for batch in ready.plan.batches)
        return RemoteStaging(
            url,
            stamp,
            force=options.force,
            resume=resume,
            needed_bytes=largest,
            say=say.note,
            share=planned.share,
            needs=needs,
        )
    reads = [
        ready.checkpoint.root if ready.checkpoint.path.is_dir() else ready.checkpoint.path,
        *(base.folder for base in ready.model.bases.values()),
    ]
    if planned.share is not None:
        from llava_convert.storage.output.shared import SharedStaging

        return SharedStaging(
            ready.out,
            stamp,
            planned.share,
            force=options.force,
            needed_bytes=sum(shard.size for shard in _written(planned)),
            reads=reads,
            say=say.note,
            warn=say.warn,
            sha256=options.level == FULL,
        )
    return Staging(
        ready.out,
        stamp,
        force=options.force,
        resume=resume,
        needed_bytes=planned.bytes_written,
        reads=reads,
        say=say.note,
        warn=say.warn,
        needs=needs,
        sha256=options.level == FULL,
    )


def _stamp(planned: str, snapshot: Snapshot, files: Iterable[Path] | None = None) -> str:
    """What runs that take up each other's files have in common: a plan's hash, and sources that nobody touched since.

    It says the same on every machine that sees the sources under the same paths, with the same times. `files` are the
    sources that count, all by default.
    """
    wanted = snapshot.states.keys() if files is None else {*files}
    states = [
        [address_of(path) or str(path), state.size, state.mtime_ns, state.version, what["sha256"]]
        for (path, state), what in zip(snapshot.states.items(), snapshot.identity, strict=True)
        if path in wanted
    ]
    return hashlib.sha256(json.dumps([planned, states]).encode()).hexdigest()


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
        next=next_step(facts, typed(source), options, here=isinstance(out, Path)),
        dtype=", ".join(sorted(TORCH_NAMES.get(d, d) for d in dtypes)),
        source_dtype=_source_dtype(plan),
        notes=tuple(map(session.called, ready.notes)),
        warnings=tuple(map(session.called, ready.warnings)),
        verified=options.level,
        done=False,
        memory=peak_memory(plan),
        seconds=_seconds(plan, options.threads) if isinstance(out, Path) else None,
        disk_free=free_bytes(out) if isinstance(out, Path) else None,
        parts={PART_WORDS[part]: part_story(model, plan, part) for part in PARTS},
        fetched=session.fetched,
        dropped=(*ready.checkpoint.dropped, *model.dropped),
        unchecked=session.unchecked,
        share=None if options.share is None else tuple(shard.name for shard in plan.share(*options.share)),
    )


def _seconds(plan: Plan, threads: int) -> float | None:
    """How long it may take; None where a network decides."""
    if any(remote_of(path) is not None for path in _reads(plan.shards)):
        return None
    return seconds(plan, threads or thread_count(plan.tensors))


def _source_dtype(plan: Plan) -> str:
    """The dtype of most bytes of the language model as stored; of all weights where there is none."""
    pieces = [piece for tensor in plan.tensors for piece in tensor.pieces]
    sizes: Counter[str] = Counter()
    for piece in [p for p in pieces if p.canonical.startswith(LLM)] or pieces:
        sizes[piece.source.dtype] += piece.source.nbytes
    return TORCH_NAMES.get(most := sizes.most_common(1)[0][0], most) if sizes else ""


def recorded_options(options: Options) -> dict[str, Any]:
    """What conversion.json says of the options that shape the output: each that was given, and five in any case.

    Paths stay out: no such option is one.
    """
    defaults = {"dtype": AUTO, "max_shard_size": AUTO, "part": None, "prompt_template": None, "image_processor": "clip"}
    target = options.target
    found = options_of(OutputOptions).values()
    given = {option.spelling.strip("-").replace("-", "_"): getattr(target, option.name) for option in found}
    return defaults | {name: value for name, value in given.items() if value is not None} | {"part": target.part}


def _nonfinite_warning(outcome: Outcome) -> str | None:
    bad = outcome.nonfinite
    if not bad:
        return None
    name = max(bad, key=lambda n: bad[n])
    return f"{sum(bad.values()):,} NaN or infinite values in {len(bad)} tensors, kept as they are (most in {name})"
