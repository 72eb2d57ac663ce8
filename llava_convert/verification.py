"""Is the output what it should be? Quick: by headers and files. Full: every byte recomputed and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_convert.checkpoint import VISION, Checkpoint
from llava_convert.compare import Difference, compare
from llava_convert.errors import ConvertError, MismatchError
from llava_convert.layouts import layout, open_checkpoint
from llava_convert.layouts.base import TargetOptions
from llava_convert.mapping import grouped, printable
from llava_convert.model import Bases, Recipe, assemble, without_added
from llava_convert.numerics import FLOATS
from llava_convert.ops import Cast, PadRows
from llava_convert.plan import Output, Plan, PlannedTensor, Shard
from llava_convert.spec import StoredTensor
from llava_convert.storage.jsonfile import read_json
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.torch_file import read_torch, state_dict

QUICK, FULL, OFF = "quick", "full", "off"


def check_quick(plan: Plan, folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Reopen a written output by its headers; returns each shard's tensors. Raises MismatchError (exit 7)."""
    written = {shard.name: _check_shard(shard, folder / shard.name) for shard in plan.shards}
    for name, data in {**plan.files, **plan.indexes}.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(data):
            raise MismatchError(f"{name} was not written whole")
        if name.endswith(".json"):
            read_json(path)
    for name in plan.indexes:
        _check_index(name, folder, written)
    return written


def _check_shard(shard: Shard, path: Path) -> dict[str, StoredTensor]:
    if shard.container == "torch":
        found = dict(state_dict(read_torch(path)).tensors)
    else:
        found = dict(read_header(path).tensors)
    if list(sorted(found)) != sorted(t.name for t in shard.tensors):
        raise MismatchError(f"{shard.name}: its tensors are not the planned ones")
    for t in shard.tensors:
        stored = found[t.name]
        place = stored.extents[0].offset if stored.extents else t.offset
        if (stored.dtype, stored.shape) != (t.dtype, t.shape) or (shard.container != "torch" and place != t.offset):
            raise MismatchError(
                f"{shard.name}: {printable(t.name)} is {stored.dtype} {list(stored.shape)} at {place}, "
                f"planned {t.dtype} {list(t.shape)} at {t.offset}"
            )
    return found


def _check_index(name: str, folder: Path, written: dict[str, dict[str, StoredTensor]]) -> None:
    prefix = name.rpartition("/")[0]
    for tensor, file in read_json(folder / name)["weight_map"].items():
        if tensor not in written[f"{prefix}/{file}" if prefix else file]:
            raise MismatchError(f"{name} places {tensor} in {file}, which does not hold it")


def check_full(
    plan: Plan, written: dict[str, dict[str, StoredTensor]], pool: FilePool, *, progress: Callable[[int], None]
) -> dict[str, int]:
    """Reread both sides: copies compared directly, every op recomputed. Raises MismatchError (exit 7).

    Returns how many NaN or infinite values each tensor holds, where there are any.
    """
    nonfinite: dict[str, int] = {}
    for shard in plan.shards:
        found = compare(shard.tensors, written[shard.name], pool, progress=progress)
        nonfinite |= found.nonfinite
        if found.differences:
            name, gap = next(iter(found.differences.items()))
            raise MismatchError(
                f"{shard.name}: {printable(name)} differs from what the source gives in {gap.elements} elements "
                f"(and {len(found.differences) - 1} more tensors)"
            )
    return nonfinite


@dataclass(frozen=True)
class Verdict:
    """What `verify SOURCE OUT` found."""

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

    @property
    def same(self) -> bool:
        return not (self.different or self.missing or self.extra or self.settings)

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
        raise MismatchError(f"{self.out} is not {self.source}: " + "; ".join([*said, *self.settings]))

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

    Each tensor is made as a conversion to OUT's layout would make it, cast to the dtype that OUT has it in, and
    compared bit for bit. Rows beyond the source's vocabulary are counted, not compared. Raises what opening raises.
    """
    theirs, _ = open_checkpoint(out)
    target = layout(theirs.layout)
    part = options.part
    recorded = _recorded(out)
    if recorded is not None and part == "all":
        part = recorded.get("part", "all")
    options = replace(options, part=part)
    need = target.needs(source, part)
    model = assemble(
        source,
        bases,
        weights=need.weights,
        configs=need.configs,
        optional_configs=need.optional_configs,
    )
    if source.layout != theirs.layout:
        model = without_added(model)
    wanted = {o.canonical: o for files in target.lower(model, options).sets for o in files.outputs}
    stored = theirs.tensors()
    planned: list[PlannedTensor] = []
    aligned: dict[str, StoredTensor] = {}
    different: dict[str, Difference] = {}
    added: dict[str, int] = {}
    for name in sorted(wanted.keys() & stored.keys()):
        tensor, rows = _replayed(wanted[name], stored[name])
        if tensor is None:
            different[name] = Difference(stored[name].numel, float("nan"))
            continue
        planned.append(tensor)
        aligned[name] = stored[name]
        if rows:
            added[name] = rows
    with FilePool() as pool:
        sink = compare(planned, aligned, pool, progress=progress)
    different |= sink.differences
    return Verdict(
        source=str(source.path),
        out=str(out),
        layouts=(source.layout, theirs.layout),
        equal=len(planned) - len(sink.differences),
        different=different,
        missing=tuple(sorted(wanted.keys() - stored.keys())),
        extra=tuple(sorted(_untied(stored.keys() - wanted.keys(), model.tied))),
        added_rows=added,
        settings=_settings(source, theirs),
        notes=tuple([*model.warnings]),
    )


def _untied(extra: set[str], tied: bool) -> set[str]:
    """A head written out beside a tied embedding says nothing new."""
    return extra - {"language_model.lm_head.weight"} if tied else extra


def _recorded(out: Path) -> dict[str, Any] | None:
    file = out / "conversion.json"
    try:
        found = read_json(file) if file.is_file() else None
    except ConvertError:
        return None
    options = found.get("options") if isinstance(found, dict) else None
    return options if isinstance(options, dict) else None


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
        if stored.dtype not in FLOATS or recipe.dtype not in FLOATS:
            return None, 0
        recipe = recipe.then(Cast(stored.dtype))
    planned = PlannedTensor(
        output.canonical, output.canonical, recipe.tensor, recipe.origin, recipe.ops, stored.dtype, recipe.shape, 0
    )
    return planned, extra


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
        config = json.loads((theirs.root / "config.json").read_text(encoding="utf-8"))
        if not config.get("unfreeze_mm_vision_tower"):
            said.append("OUT holds a vision tower that its loader ignores (unfreeze_mm_vision_tower is not true)")
    return tuple(said)
