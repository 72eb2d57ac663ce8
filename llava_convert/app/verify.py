"""Whether one checkpoint holds the weights of another, of whichever layouts and made by whichever converter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from llava_convert.app.adapters import with_whole_bases
from llava_convert.app.extras import without_extra
from llava_convert.app.facts import fitted
from llava_convert.app.judge import judge
from llava_convert.app.options import SourceOptions
from llava_convert.app.planning import part_asked
from llava_convert.app.provenance import provenance_of
from llava_convert.app.session import job_session, tell_unchecked
from llava_convert.app.source import bases_left, config_from, made_whole, open_options, recognised
from llava_convert.app.verdict import Verdict
from llava_convert.core.arrays import FLOATS
from llava_convert.core.progress import Reporter, Silence, stage
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.engine.compare import Difference, compare, merged_in_float32, nonfinite_after
from llava_convert.engine.shards import PlannedTensor
from llava_convert.layouts.registry import layout, recognise
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PARTS, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.judgement import FactDifference, Judgement
from llava_convert.model.options import ALL, TargetOptions, part_named
from llava_convert.model.quantized import dequantized, refuse_packed
from llava_convert.model.recipe import Bases, Model
from llava_convert.model.record import read_options
from llava_convert.model.reshape import relation, reshaped
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.target import Output
from llava_convert.ops import steps
from llava_convert.ops.base import Op
from llava_convert.ops.rows import PadRows
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.remote.reach import reach
from llava_convert.storage.remote.session import Session
from llava_convert.storage.sidecars import Sidecars

_SHOWN = 6  # facts in a message
_SHAPING = ("prompt_template", "chat_template", "stop", "image_processor", "pre")


def compare_checkpoints(
    source: Checkpoint,
    every: Sequence[Checkpoint],
    session: Session,
    *,
    bases: Bases,
    options: TargetOptions,
    vocab: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Whether OUT, of any layout and from any converter, holds the weights of the source, tensor by tensor.

    `every` are the models in OUT: several where it has several types of one.

    Each tensor is made as a conversion to OUT's layout would make it, in the dtype that OUT has it in, and compared bit
    for bit. Rows beyond the source's vocabulary are counted, not compared. Raises what opening raises.
    """
    target = layout(every[0].layout)
    part = options.part if options.part != ALL else _part_of(every, source)
    options = replace(options, part=part)
    need = target.needs(source, part)
    source = dequantized(source)
    refuse_packed(source, need.weights)
    model = assemble(
        source,
        bases,
        session,
        weights=need.weights,
        configs=need.configs,
        optional_configs=need.optional_configs,
        vocab=vocab,
    )
    embedding = model.embedding if LLM in model.configs else ""
    kept = need.keep_added and _rows(every, embedding) == _rows([source], embedding)
    if source.vocabulary_layout != every[0].layout and not kept:
        # Of a target that keeps added rows, OUT may still have been made of the model before they were added.
        model = without_added(model)
    model = _alike(fitted(model, every[0].layout), every)
    told = getattr(target, "made_with", None)
    options = replace(options, **(told(every[0]) if told is not None else {}))
    made = target.lower(model, _as_made(options, every[0].beside))
    outputs = [o for files in made.sets for o in files.outputs]
    wanted = {o.canonical: o for output in outputs for o in output.apart}
    made_up = {name for name, output in wanted.items() if output.recipe.origin == "synthetic"}
    found = _Compared()
    for theirs in every:
        label = f"{theirs.files[0].name}: " if len(every) > 1 else ""
        held = {name for name in PARTS if theirs.parts[name].state != "absent"} if len(every) > 1 else set(PARTS)
        mine = {name: o for name, o in wanted.items() if name not in made_up and _is_of(name, held)}
        _compare_one(found, mine, theirs, label, model=model, made_up=made_up, progress=progress)
        found.judge(judge(model, made, theirs, held & _parts_of(theirs)), label)
        found.defects += [f"{label}{text}" for text in theirs.defects]
        found.extra += [label + name for name in (theirs.extra.names if theirs.extra is not None else ())]
    lacking = [n for n in wanted if not any(_holds_part_of(theirs, n) for theirs in every)] if len(every) > 1 else []
    return Verdict(
        source=str(source.path),
        out=str(every[0].path),
        layouts=(source.layout, every[0].layout),
        equal=found.equal,
        different=found.different,
        missing=tuple(sorted({*found.missing, *lacking})),
        extra=tuple(sorted(found.extra)),
        added_rows=found.added,
        unrecorded_rows=found.unrecorded,
        facts=found.facts,
        harmless=found.harmless,
        not_compared=tuple(dict.fromkeys(found.not_compared)),
        notes=tuple([*model.warnings]),
        defects=tuple(found.defects),
        synthetic=tuple(sorted(made_up)),
        quantised=found.quantised,
        rounded=found.rounded,
        alike=found.alike,
    )


def _alike(model: Model, every: Sequence[Checkpoint]) -> Model:
    """The model in the shape of OUT's language model, where a table relates the two families."""
    configs = (theirs.parts[LLM].config or {} for theirs in every)
    other = next((known for c in configs if (known := known_architecture(LLM, c.get("model_type"))) is not None), None)
    if other is None or not model.part(LLM):
        return model
    own = family(LLM, model.configs[LLM])
    return model if own is other or relation(own, other) is None else reshaped(model, other)


def _part_of(every: Sequence[Checkpoint], source: Checkpoint) -> str:
    """The part of the model that OUT was made of: by its files where they tell, else by its record."""
    alone = [theirs.default_part for theirs in every if theirs.whole and theirs.default_part != ALL]
    if alone and len(alone) == len(every):
        return alone[0]
    recorded = part_named((read_options(every[0].beside) or {}).get("part"))
    if recorded not in (None, ALL) and not any(theirs.whole for theirs in every):
        return recorded
    return source.default_part


def _as_made(options: TargetOptions, beside: Sidecars) -> TargetOptions:
    """With the options that OUT's record names, which shape its small files."""
    recorded = read_options(beside) or {}
    said: dict[str, Any] = {name: recorded.get(name) for name in _SHAPING if getattr(options, name) is None}
    shaping: dict[str, Any] = {name: value for name, value in said.items() if isinstance(value, str | list)}
    return replace(options, **shaping)


def _parts_of(theirs: Checkpoint) -> set[str]:
    return {name for name in PARTS if theirs.parts[name].state != "absent"}


def _rows(every: Sequence[Checkpoint], embedding: str) -> int | None:
    """Of the embedding, in the first that has one."""
    found = (checkpoint.parts[LLM].weights.get(embedding) for checkpoint in every)
    return next((tensor.shape[0] for tensor in found if tensor is not None and tensor.shape), None)


@dataclass
class _Compared:
    """What has been found so far, over all files of OUT."""

    equal: int = 0
    quantised: int = 0
    different: dict[str, Difference] = field(default_factory=dict)
    rounded: dict[str, Difference] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    unrecorded: dict[str, int] = field(default_factory=dict)
    facts: dict[str, FactDifference] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    alike: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def judge(self, found: Judgement, label: str) -> None:
        self.facts |= {label + name: difference for name, difference in found.different.items()}
        self.harmless |= {label + name: reason for name, reason in found.harmless.items()}
        self.alike |= {label + name: values for name, values in found.alike.items()}
        self.not_compared += found.not_compared


def _compare_one(
    found: _Compared,
    wanted: dict[str, Output],
    theirs: Checkpoint,
    label: str,
    *,
    model: Model,
    made_up: set[str],
    progress: Callable[[int], None],
) -> None:
    """Compare the tensors of one model of OUT with the `wanted` ones."""
    stored = theirs.tensors()
    embedding, head = (model.embedding, model.head) if LLM in model.configs else ("", "")
    if model.tied and head in stored and head not in wanted and embedding in wanted:
        wanted = {**wanted, head: replace(wanted[embedding], canonical=head)}  # written out, it must say nothing new
    recorded = (theirs.record or {}).get("added")
    planned: list[PlannedTensor] = []
    aligned: dict[str, StoredTensor] = {}
    tails: dict[str, int] = {}
    averaged: dict[str, int] = {}
    for name in sorted(wanted.keys() & stored.keys()):
        tensor, rows = _replayed(
            wanted[name], stored[name], recorded=recorded is not None, grows=name in (embedding, head)
        )
        if tensor is None:
            found.different[label + name] = Difference(stored[name].numel, shapes=(rows, stored[name].shape))
            continue
        planned.append(tensor)
        aligned[name] = stored[name]
        more = stored[name].shape[0] - rows[0] if rows else 0
        if more:
            found.added[label + name] = more
            if tensor.shape != stored[name].shape:
                tails[name] = rows[0]
            else:
                averaged[name] = rows[0] * (stored[name].nbytes // stored[name].shape[0])
    with FilePool() as pool:
        sink = compare(planned, aligned, pool, progress=progress, tails=averaged)
        rounded = merged_in_float32([t for t in planned if t.name in sink.differences], aligned, pool)
        for name, row in tails.items():
            found.unrecorded[label + name] = stored[name].shape[0] - row
            if bad := nonfinite_after(stored[name], row, pool):
                found.different[label + name] = Difference(bad, float("nan"))
    _check_record(found, recorded, stored.get(embedding), label)
    for name, difference in sink.differences.items():
        (found.rounded if name in rounded else found.different)[label + name] = difference
    found.equal += len(planned) - len(sink.differences.keys() | (tails.keys() & _unlabelled(found.different, label)))
    blocks = {t.canonical for t in planned if t.dtype in QUANTS and t.source.dtype not in QUANTS}
    found.quantised += len(blocks - sink.differences.keys())
    found.missing += [label + name for name in wanted.keys() - stored.keys()]
    found.extra += [label + name for name in stored.keys() - wanted.keys() - made_up]


def _is_of(name: str, parts: set[str]) -> bool:
    return name.partition(".")[0] in parts or name.partition(".")[0] not in PARTS


def _holds_part_of(theirs: Checkpoint, name: str) -> bool:
    part = theirs.parts.get(name.partition(".")[0])
    return part is None or part.state != "absent"


def _unlabelled(different: dict[str, Difference], label: str) -> set[str]:
    return {name.removeprefix(label) for name in different}


def _check_record(found: _Compared, recorded: Any, embedding: StoredTensor | None, label: str) -> None:
    """OUT's record of added rows must be true of OUT."""
    if isinstance(recorded, dict) and embedding is not None and recorded["rows"]["to"] != embedding.shape[0]:
        found.facts[f"{label}rows of the embedding, by OUT's record"] = FactDifference(
            recorded["rows"]["to"], embedding.shape[0]
        )


def _replayed(
    output: Output, stored: StoredTensor, *, recorded: bool, grows: bool
) -> tuple[PlannedTensor | None, tuple[int, ...]]:
    """The tensor as a conversion would make it, in the stored dtype, and the shape that it has in the source.

    OUT may have more rows where the tensor `grows`, as a vocabulary's does: those that it `recorded` are made again,
    others are left out. None for the tensor where the two cannot be compared.
    """
    recipe = output.recipe
    bare = replace(recipe, ops=tuple(op for op in recipe.ops if not isinstance(op, PadRows)))
    shape = bare.shape
    if not (recorded and recipe.shape == stored.shape):
        recipe = bare
    if recipe.shape != stored.shape:
        more = recipe.shape[1:] == stored.shape[1:] and recipe.shape[:1] <= stored.shape[:1]
        if not more or not grows:
            return None, shape
    if recipe.dtype != stored.dtype:
        if any(dtype not in FLOATS and dtype not in QUANTS for dtype in (stored.dtype, recipe.dtype)):
            return None, shape
        recipe = recipe.then(*_between(recipe.dtype, stored.dtype))
    planned = PlannedTensor(
        output.canonical, output.canonical, recipe.tensor, recipe.origin, recipe.ops, stored.dtype, recipe.shape, 0
    )
    return planned, shape


def _between(dtype: str, to: str) -> tuple[Op, ...]:
    """The ops to OUT's dtype, from one block type to another by way of floats."""
    if dtype in QUANTS and to in QUANTS:
        return (*steps(dtype, "F32"), *steps("F32", to))
    return steps(dtype, to)


def verify(
    source: str | Path,
    out: str | Path,
    options: SourceOptions | None = None,
    say: Reporter | None = None,
    *,
    part: str = ALL,
    provenance: bool = False,
) -> Verdict:
    """Compare OUT with SOURCE, tensor by tensor; the caller decides what a difference means.

    With `provenance` the verdict tells where both come from, for which their files are looked at once more.
    """
    say = say or Silence()
    with job_session(options) as session:
        return _verify(source, out, options or SourceOptions(), say, part_asked(part), session, provenance=provenance)


def _verify(
    source: str | Path,
    theirs: str | Path,
    options: SourceOptions,
    say: Reporter,
    part: str,
    session: Session,
    *,
    provenance: bool,
) -> Verdict:
    stage(say, "opening")
    found = recognised(source, options, session)
    out = reach(theirs, session, cache=options.bases.cache)
    other = recognise(out, None, config_from(options, session) if out.is_file() else None)
    # In another layout quantised weights have become floats.
    opened = found.open(open_options(options, session, found.layout != other.layout)), found.why
    checkpoint, _, told = made_whole(opened, options, session, other.layout)
    checkpoint = without_extra(checkpoint, part if part != ALL else checkpoint.default_part, options.extra)
    for text in map(session.called, told):
        say.warn(text)
    total = out.stat().st_size if out.is_file() else sum(p.stat().st_size for p in out.rglob("*"))
    target = TargetOptions(part=part, lora_alpha=options.bases.lora_alpha)
    every = other.open_each()
    verdict = compare_checkpoints(
        checkpoint,
        every,
        session,
        bases=with_whole_bases(bases_left(options.bases, checkpoint), options, session),
        options=target,
        vocab=options.vocab,
        progress=say.start("comparing", total),
    )
    tell_unchecked(session, say)
    return replace(
        verdict,
        source=session.called(checkpoint.path),
        out=session.called(out),
        notes=tuple(map(session.called, verdict.notes)),
        defects=tuple(map(session.called, verdict.defects)),
        provenance=(provenance_of([checkpoint], session), provenance_of(every, session)) if provenance else None,
    )
