"""Whether one checkpoint holds the weights of another, of whichever layouts and made by whichever converter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava_convert.app.facts import fitted
from llava_convert.app.judge import judge
from llava_convert.app.logits.compare import Logits
from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import MismatchError
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.engine.compare import Difference, compare, merged_in_float32, nonfinite_after
from llava_convert.engine.shards import PlannedTensor
from llava_convert.layouts.registry import layout
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PARTS, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.facts import spelled
from llava_convert.model.judgement import FactDifference, Judgement
from llava_convert.model.options import ALL, TargetOptions, part_named
from llava_convert.model.quantized import dequantized, refuse_packed
from llava_convert.model.recipe import Bases, Model
from llava_convert.model.record import read_options
from llava_convert.model.reshape import relation, reshaped
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.tables.names import grouped
from llava_convert.model.target import Output
from llava_convert.ops import steps
from llava_convert.ops.base import Op
from llava_convert.ops.rows import PadRows
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.remote.session import Session
from llava_convert.storage.sidecars import Sidecars

_SHOWN = 6  # facts in a message
_SHAPING = ("prompt_template", "image_processor", "pre")


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `verify SOURCE OUT` found; false where the models differ.

    Names are canonical ones; where OUT holds several files of one model, after the file's. `synthetic` are tensors that
    SOURCE's layout never has: OUT's are not compared. `quantised` of the `equal` ones are blocks in OUT and were floats
    in SOURCE: they equal its quantisation, recomputed. `rounded` are tensors of merged LoRA, of which some elements are
    the exact merge but for what a merge in float32, as others do it, rounds otherwise: mostly by the last bit.

    `added_rows` of a vocabulary are in OUT alone, by tensor; those that OUT's record tells of are compared with what it
    says, `unrecorded_rows` are only looked at for NaN. `facts` differ: what configs, tokenizer, processor and metadata
    say that decides how a model computes, is prompted or stops. `harmless` keys differ and decide nothing, each with
    the reason. `not_compared` is what OUT or SOURCE cannot tell. `defects` are what readers of OUT choke on.
    `logits` is what both models made of the same pictures and prompts, where that was asked for.
    """

    source: str
    out: str
    layouts: tuple[str, str]
    equal: int
    different: dict[str, Difference]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    added_rows: dict[str, int] = field(default_factory=dict)
    unrecorded_rows: dict[str, int] = field(default_factory=dict)
    facts: dict[str, FactDifference] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    quantised: int = 0
    rounded: dict[str, Difference] = field(default_factory=dict)
    logits: Logits | None = None

    @property
    def same(self) -> bool:
        alike = not (self.different or self.missing or self.extra or self.facts or self.defects)
        return alike and (self.logits is None or self.logits.same)

    def __bool__(self) -> bool:
        return self.same

    def __repr__(self) -> str:
        counts = {"different": self.different, "missing": self.missing, "extra": self.extra}
        said = "".join(f", {word}={len(found)}" for word, found in counts.items())
        more = "".join(f", {word}={list(found)}" for word in ("facts", "defects") if (found := getattr(self, word)))
        return f"Verdict(same={self.same}, equal={self.equal}{said}{more})"

    def sentence(self) -> str:
        """What was found of a model that is the same."""
        parts = [f"{self.equal - self.quantised} tensors equal bit for bit"] if self.equal > self.quantised else []
        if self.quantised:
            parts.append(f"{self.quantised} equal the quantisation of the source, recomputed")
        if self.rounded:
            count = sum(difference.elements for difference in self.rounded.values())
            parts.append(
                f"{len(self.rounded)} but for {count} elements, which a merge of LoRA in float32 rounds otherwise"
            )
        said = f"the same: {', '.join(parts) or 'no tensor'}, and all that configs, tokenizer and processor say"
        rows = max(self.added_rows.values(), default=0)
        unknown = max(self.unrecorded_rows.values(), default=0)
        if rows and not unknown:
            said += f"; {rows} rows that were added are as the record says"
        elif unknown:
            said += f"; plus {unknown} unrecorded rows of the vocabulary, which are not compared"
        return said if self.logits is None else f"{said}; {self.logits.sentence()}"

    def refuse(self, *, strict: bool = False) -> None:
        """Raise MismatchError (exit 7) unless all is equal; `strict`: and every row of OUT's vocabulary is known."""
        if self.same:
            if strict and self.unrecorded_rows:
                raise MismatchError(f"{self.out} is not {self.source} alone: {self.sentence()}")
            return
        said = [f"{len(self.different)} tensors differ: {grouped(self.different)}"] if self.different else []
        if self.different:
            shaped = {name: d.shapes for name, d in self.different.items() if d.shapes is not None}
            gaps = [d.largest for d in self.different.values() if not math.isnan(d.largest) and d.shapes is None]
            said[0] += f" (largest difference {max(gaps):.3g})" if gaps else ""
            for name, (mine, theirs) in list(shaped.items())[:3]:
                said.append(f"{name} is {list(mine)} in the source, {list(theirs)} in OUT")
        if self.missing:
            said.append(f"{len(self.missing)} are missing: {grouped(self.missing)}")
        if self.extra:
            said.append(f"{len(self.extra)} are not in the source: {grouped(self.extra)}")
        said += [f"{name} is {spelled(d.source)} in the source, {spelled(d.out)} in OUT" for name, d in self._shown()]
        if len(self.facts) > _SHOWN:
            said.append(f"and {len(self.facts) - _SHOWN} more facts differ (--json lists them)")
        if self.logits is not None and not self.logits.same:
            said.append(self.logits.sentence())
        if said:
            raise MismatchError(f"{self.out} is not {self.source}: " + "; ".join([*said, *self.defects]))
        raise MismatchError(f"{self.out} holds the weights of {self.source}, but: " + "; ".join(self.defects))

    def _shown(self) -> list[tuple[str, FactDifference]]:
        return list(self.facts.items())[:_SHOWN]

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "layout": self.layouts[0],
            "out": self.out,
            "to": self.layouts[1],
            "same": self.same,
            "equal": self.equal,
            "different": {name: d.as_json() for name, d in sorted(self.different.items())},
            "rounded": {name: d.as_json() for name, d in sorted(self.rounded.items())},
            "missing": list(self.missing),
            "extra": list(self.extra),
            "added_rows": self.added_rows,
            "unrecorded_rows": self.unrecorded_rows,
            "facts": {name: {"source": d.source, "out": d.out} for name, d in sorted(self.facts.items())},
            "harmless": dict(sorted(self.harmless.items())),
            "not_compared": list(self.not_compared),
            "warnings": list(self.notes),
            "defects": list(self.defects),
            "synthetic": list(self.synthetic),
            "quantised": self.quantised,
            "logits": None if self.logits is None else self.logits.as_json(),
        }


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
    shaping: dict[str, Any] = {name: value for name, value in said.items() if isinstance(value, str)}
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
    not_compared: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def judge(self, found: Judgement, label: str) -> None:
        self.facts |= {label + name: difference for name, difference in found.different.items()}
        self.harmless |= {label + name: reason for name, reason in found.harmless.items()}
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
