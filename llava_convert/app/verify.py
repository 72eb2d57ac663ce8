"""Whether one checkpoint holds the weights of another, of whichever layouts and made by whichever converter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import MismatchError
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.engine.compare import Difference, compare
from llava_convert.engine.shards import PlannedTensor
from llava_convert.layouts.registry import layout, open_each
from llava_convert.model.assemble import assemble, without_added
from llava_convert.model.checkpoint import LLM, PARTS, VISION, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.options import ALL, TargetOptions, part_named
from llava_convert.model.recipe import Bases, Model, Recipe
from llava_convert.model.record import read_options
from llava_convert.model.reshape import relation, reshaped
from llava_convert.model.tables.families import known_architecture
from llava_convert.model.tables.names import grouped
from llava_convert.model.target import Output
from llava_convert.ops import steps
from llava_convert.ops.base import Op
from llava_convert.ops.rows import PadRows
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.sidecars import folder_sidecars


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `verify SOURCE OUT` found; false where the models differ.

    Names are canonical ones; where OUT holds several files of one model, after the file's. `synthetic` are tensors that
    SOURCE's layout never has: OUT's are not compared. `quantised` of the `equal` ones are blocks in OUT and were floats
    in SOURCE: they equal its quantisation, recomputed. `defects` are what readers of OUT choke on.
    """

    source: str
    out: str
    layouts: tuple[str, str]
    equal: int
    different: dict[str, Difference]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    added_rows: dict[str, int] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    quantised: int = 0

    @property
    def same(self) -> bool:
        return not (self.different or self.missing or self.extra or self.settings or self.defects)

    def __bool__(self) -> bool:
        return self.same

    def __repr__(self) -> str:
        counts = {"different": self.different, "missing": self.missing, "extra": self.extra}
        said = "".join(f", {word}={len(found)}" for word, found in counts.items())
        more = "".join(f", {word}={list(found)}" for word in ("settings", "defects") if (found := getattr(self, word)))
        return f"Verdict(same={self.same}, equal={self.equal}{said}{more})"

    def refuse(self) -> None:
        """Raise MismatchError (exit 7) unless all is equal."""
        if self.same:
            return
        said = [f"{len(self.different)} tensors differ: {grouped(self.different)}"] if self.different else []
        if self.different:
            worst = max(self.different.values(), key=lambda d: d.largest)
            said[0] += f" (largest difference {worst.largest:.3g})"
        if self.missing:
            said.append(f"{len(self.missing)} are missing: {grouped(self.missing)}")
        if self.extra:
            said.append(f"{len(self.extra)} are not in the source: {grouped(self.extra)}")
        said += self.settings
        if said:
            raise MismatchError(f"{self.out} is not {self.source}: " + "; ".join([*said, *self.defects]))
        raise MismatchError(f"{self.out} holds the weights of {self.source}, but: " + "; ".join(self.defects))

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": self.out,
            "layouts": list(self.layouts),
            "same": self.same,
            "equal": self.equal,
            "different": {k: {"elements": d.elements, "largest": d.largest} for k, d in sorted(self.different.items())},
            "missing": list(self.missing),
            "extra": list(self.extra),
            "added_rows": self.added_rows,
            "settings": list(self.settings),
            "notes": list(self.notes),
            "defects": list(self.defects),
            "synthetic": list(self.synthetic),
            "quantised": self.quantised,
        }


def compare_checkpoints(
    source: Checkpoint,
    out: Path,
    *,
    bases: Bases,
    options: TargetOptions,
    progress: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Whether OUT, of any layout and from any converter, holds the weights of the source, tensor by tensor.

    Each tensor is made as a conversion to OUT's layout would make it, in the dtype that OUT has it in, and compared bit
    for bit. Rows beyond the source's vocabulary are counted, not compared. Raises what opening raises.
    """
    every = open_each(out)
    target = layout(every[0].layout)
    part = options.part if options.part != ALL else _part_of(every, out, source)
    options = replace(options, part=part)
    need = target.needs(source, part)
    model = assemble(
        source,
        bases,
        weights=need.weights,
        configs=need.configs,
        optional_configs=need.optional_configs,
    )
    embedding = model.embedding if LLM in model.configs else ""
    kept = need.keep_added and _rows(every, embedding) == _rows([source], embedding)
    if source.layout != every[0].layout and not kept:
        # Of a target that keeps added rows, OUT may still have been made of the model before they were added.
        model = without_added(model)
    model = _alike(model, every)
    outputs = [o for files in target.lower(model, options).sets for o in files.outputs]
    wanted = {o.canonical: o for output in outputs for o in output.apart}
    made_up = {name for name, output in wanted.items() if output.recipe.origin == "synthetic"}
    untold = {model.head} if model.tied else set()  # beside a tied embedding a head says nothing new
    found = _Compared()
    for theirs in every:
        label = f"{theirs.files[0].name}: " if len(every) > 1 else ""
        held = {name for name in PARTS if theirs.parts[name].state != "absent"} if len(every) > 1 else set(PARTS)
        mine = {name: o for name, o in wanted.items() if name not in made_up and _is_of(name, held)}
        _compare_one(found, mine, theirs, label, untold=untold, made_up=made_up, progress=progress)
        found.settings += [text for text in _settings(source, theirs) if VISION in held]
        found.defects += [f"{label}{text}" for text in theirs.defects]
    lacking = [n for n in wanted if not any(_holds_part_of(theirs, n) for theirs in every)] if len(every) > 1 else []
    return Verdict(
        source=str(source.path),
        out=str(out),
        layouts=(source.layout, every[0].layout),
        equal=found.equal,
        different=found.different,
        missing=tuple(sorted({*found.missing, *lacking})),
        extra=tuple(sorted(found.extra)),
        added_rows=found.added,
        settings=tuple(dict.fromkeys(found.settings)),
        notes=tuple([*model.warnings]),
        defects=tuple(found.defects),
        synthetic=tuple(sorted(made_up)),
        quantised=found.quantised,
    )


def _alike(model: Model, every: Sequence[Checkpoint]) -> Model:
    """The model in the shape of OUT's language model, where a table relates the two families."""
    configs = (theirs.parts[LLM].config or {} for theirs in every)
    other = next((known for c in configs if (known := known_architecture(LLM, c.get("model_type"))) is not None), None)
    if other is None or not model.part(LLM):
        return model
    own = family(LLM, model.configs[LLM])
    return model if own is other or relation(own, other) is None else reshaped(model, other)


def _part_of(every: Sequence[Checkpoint], out: Path, source: Checkpoint) -> str:
    """The part of the model that OUT was made of: by its files where they tell, else by its record."""
    alone = [theirs.default_part for theirs in every if theirs.whole and theirs.default_part != ALL]
    if alone and len(alone) == len(every):
        return alone[0]
    recorded = part_named((read_options(out) or {}).get("part"))
    if recorded not in (None, ALL) and not any(theirs.whole for theirs in every):
        return recorded
    return source.default_part


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
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


def _compare_one(
    found: _Compared,
    wanted: dict[str, Output],
    theirs: Checkpoint,
    label: str,
    *,
    untold: set[str],
    made_up: set[str],
    progress: Callable[[int], None],
) -> None:
    """Compare the tensors of one model of OUT with the `wanted` ones."""
    stored = theirs.tensors()
    planned: list[PlannedTensor] = []
    aligned: dict[str, StoredTensor] = {}
    for name in sorted(wanted.keys() & stored.keys()):
        tensor, rows = _replayed(wanted[name], stored[name])
        if tensor is None:
            found.different[label + name] = Difference(stored[name].numel, float("nan"))
            continue
        planned.append(tensor)
        aligned[name] = stored[name]
        if rows:
            found.added[label + name] = rows
    with FilePool() as pool:
        sink = compare(planned, aligned, pool, progress=progress)
    found.different |= {label + name: difference for name, difference in sink.differences.items()}
    found.equal += len(planned) - len(sink.differences)
    blocks = {t.canonical for t in planned if t.dtype in QUANTS and t.source.dtype not in QUANTS}
    found.quantised += len(blocks - sink.differences.keys())
    found.missing += [label + name for name in wanted.keys() - stored.keys()]
    found.extra += [label + name for name in stored.keys() - wanted.keys() - made_up - untold]


def _is_of(name: str, parts: set[str]) -> bool:
    return name.partition(".")[0] in parts or name.partition(".")[0] not in PARTS


def _holds_part_of(theirs: Checkpoint, name: str) -> bool:
    part = theirs.parts.get(name.partition(".")[0])
    return part is None or part.state != "absent"


def _replayed(output: Output, stored: StoredTensor) -> tuple[PlannedTensor | None, int]:
    """The tensor as a conversion would make it, in the stored dtype; and how many rows OUT has beyond it."""
    recipe = Recipe(
        output.recipe.tensor, tuple(op for op in output.recipe.ops if not isinstance(op, PadRows)), output.recipe.origin
    )
    extra = 0
    if recipe.shape != stored.shape:
        if recipe.shape[1:] != stored.shape[1:] or recipe.shape[:1] > stored.shape[:1] or len(stored.shape) != 2:
            return None, 0
        extra = stored.shape[0] - recipe.shape[0]
    if recipe.dtype != stored.dtype:
        if any(dtype not in FLOATS and dtype not in QUANTS for dtype in (stored.dtype, recipe.dtype)):
            return None, 0
        recipe = recipe.then(*_between(recipe.dtype, stored.dtype))
    planned = PlannedTensor(
        output.canonical, output.canonical, recipe.tensor, recipe.origin, recipe.ops, stored.dtype, recipe.shape, 0
    )
    return planned, extra


def _between(dtype: str, to: str) -> tuple[Op, ...]:
    """The ops to OUT's dtype, from one block type to another by way of floats."""
    if dtype in QUANTS and to in QUANTS:
        return (*steps(dtype, "F32"), *steps("F32", to))
    return steps(dtype, to)


def _settings(source: Checkpoint, theirs: Checkpoint) -> tuple[str, ...]:
    """How the parts work together, where both sides say."""
    said: list[str] = []
    mine, other = source.settings, theirs.settings
    if theirs.layout != "xtuner" and source.layout != "xtuner":
        if mine.select_layer != other.select_layer:
            said.append(f"the projector reads layer {mine.select_layer} in the source, {other.select_layer} in OUT")
        if mine.select_strategy != other.select_strategy:
            said.append(f"feature selection is {mine.select_strategy} in the source, {other.select_strategy} in OUT")
    if theirs.layout == "official" and theirs.parts[VISION].state == "full":
        config = folder_sidecars(theirs.root).read_object("config.json")
        if not config.get("unfreeze_mm_vision_tower"):
            said.append("OUT holds a vision tower that its loader ignores (unfreeze_mm_vision_tower is not true)")
    return tuple(said)
