"""conversion.json: what made an output, from what, tensor by tensor; and what the way back can undo.

No timestamp and no local path: the same input gives the same bytes on every machine. It is made before the first byte
of an output; what only the run finds out, digests of tensors and files, is filled in at the end (`Record.dump`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_convert._version import __version__
from llava_convert.core.tensors import StoredTensor, stripes_of
from llava_convert.core.text import utf8
from llava_convert.core.values import dataclass
from llava_convert.engine.plan import Plan
from llava_convert.engine.shards import PlannedTensor, Shard
from llava_convert.model.checkpoint import PART_WORDS, VISION, Checkpoint, Dropped
from llava_convert.model.configs import without_stale
from llava_convert.model.recipe import Model
from llava_convert.model.target import Target
from llava_convert.ops.base import Op
from llava_convert.storage.fingerprints import identity
from llava_convert.storage.remote.origin import published

# Raised when a table changes what it means, so that records of older tables are told apart.
TABLES = 1


def sources_of(model: Model, plan: Plan) -> list[tuple[str, Path, list[Path]]]:
    """Each place that weights come from: its role, its root, the files read."""
    used = {path for t in plan.tensors for s in stored_of(t) for path in s.paths}
    places: list[tuple[str, Path, list[Path]]] = []
    claimed: set[Path] = set()
    for role, root, files in [
        ("source", model.checkpoint.root, list(model.checkpoint.files)),
        *((layer.role, layer.root, list(layer.files)) for layer in model.checkpoint.layers),
        *((PART_WORDS[part], base.folder, []) for part, base in model.bases.items()),
    ]:
        mine = sorted(p for p in used - claimed if p in files or (role != "source" and _inside(p, root)))
        claimed |= set(mine)
        if mine or role == "source":
            places.append((role, root, mine or files))
    left = sorted(used - claimed)
    if left:
        places.append(("stage 1", left[0].parent, left))
    return places


def _inside(path: Path, root: Path) -> bool:
    return root in path.parents


def stored_of(tensor: PlannedTensor) -> Iterable[StoredTensor]:
    yield tensor.source
    for op in tensor.ops:
        yield from op.inputs()


@dataclass(frozen=True)
class Record:
    """conversion.json but for its digests. What it says of each tensor is made of the plan whenever it is asked for.

    `head` is all the rest; `names` has the role and the name of each file that is read.
    """

    head: Mapping[str, Any]
    plan: Plan
    names: Mapping[Path, tuple[str, str]]

    def dump(
        self, *, digests: Mapping[tuple[str, str], str] | None = None, files: Mapping[str, Any] | None = None
    ) -> bytes:
        """The file, with digests of tensors by shard and name, and size and sha256 of the files that were checked.

        Raises KeyError where a tensor has no digest.
        """
        head = dict(self.head)
        if files is not None:
            head["verified"] = {**head["verified"], "files": dict(files)}
        return dump(head, self._entries(digests))

    def _entries(self, digests: Mapping[tuple[str, str], str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, tensor in _tensors(self.plan):
            entry = _entry(tensor, self.names)
            yield name, entry if digests is None else {**entry, "xxh3_128": digests[tensor.shard, tensor.name]}


def record(
    plan: Plan,
    target: Target,
    model: Model,
    *,
    options: Mapping[str, Any],
    verified: str,
) -> Record:
    """What conversion.json will say; `verified` is the level of the check.

    Raises InputError for a source that cannot be read.
    """
    places = sources_of(model, plan)
    names = {path: (role, _relative(path, root)) for role, root, files in places for path in files}
    head: dict[str, Any] = {
        "tool": {
            "name": "llava-convert",
            "version": __version__,
            "tables": TABLES,
            **({"kernels": plan.tags["kernels"]} if "kernels" in plan.tags else {}),
        },
        "layout": {"from": model.checkpoint.layout, "to": plan.layout},
        "options": dict(options),
        "verified": {"level": verified},
        "sources": [
            {
                "role": role,
                **published(root),
                "files": [
                    {**found, "file": names[path][1]} for path, found in zip(files, identity(files), strict=True)
                ],
            }
            for role, root, files in places
        ],
        "dropped": [{"name": d.name, "reason": d.reason} for d in (*model.checkpoint.dropped, *model.dropped)],
        "notes": [*model.checkpoint.notes, *model.notes],
        "settings": model.checkpoint.settings.record(),
    }
    if VISION in model.configs:
        # The official layout has no place for it, and the way back needs it.
        config = without_stale(model.configs[VISION])
        config.pop("_name_or_path", None)  # can be a path of this machine
        head["vision_config"] = config
    if target.added_rows is not None:
        head["added"] = dict(target.added_rows)
    return Record(head, plan, names)


def _entry(t: PlannedTensor, names: Mapping[Path, tuple[str, str]]) -> dict[str, Any]:
    """What is said of one tensor: its dtype and shape, where its bytes were, and what was done to them."""
    pieces = t.pieces
    entry: dict[str, Any] = {"dtype": t.dtype, "shape": list(t.shape)}
    if len(pieces) == 1:
        entry |= _where(t.source, names)
    else:
        entry["source"] = [_where(one.source, names) | _done(one.ops, names) for one in pieces]
    if t.origin == "synthetic":
        entry["origin"] = t.origin
    if len(pieces) == 1:
        entry |= _done(t.ops, names)
    else:
        entry["joined"] = {key: value for key, value in t.ops[-1].describe().items() if key in ("groups", "rows")}
    return entry


def _tensors(plan: Plan) -> Iterable[tuple[str, PlannedTensor]]:
    """Each tensor with its name in the record."""
    for shard in plan.shards:
        place = _place_of(shard)
        for tensor in shard.tensors:
            yield (f"{place}/{tensor.name}" if place else tensor.name), tensor


def _done(ops: Sequence[Op], names: Mapping[Path, tuple[str, str]]) -> dict[str, Any]:
    """What was done to a stored tensor, each op with the tensors that it read besides; nothing of a copy."""
    if not ops:
        return {}
    said = [(op.describe(), [_where(stored, names) for stored in op.inputs()]) for op in ops]
    return {"ops": [{**what, "inputs": inputs} if inputs else what for what, inputs in said]}


def _place_of(shard: Shard) -> str:
    """What tells tensors of one name apart: the folder; of GGUF, which has the same ones in several types, the file."""
    return shard.name if shard.container == "gguf" else shard.name.rpartition("/")[0]


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if _inside(path, root) else path.name


def _where(stored: StoredTensor, names: Mapping[Path, tuple[str, str]]) -> dict[str, Any]:
    """Where a stored tensor's bytes are, by role and file name.

    Of a matrix that was split by columns: the spans of its first row, how many `rounds` of them follow each other, and
    by how many bytes each span moves on (`step`).
    """
    spans: list[dict[str, Any]] = []
    for stripe in stripes_of(stored.extents):
        told: list[dict[str, Any]] = []
        for extent, step in stripe.pieces:
            role, file = names.get(extent.path, ("source", extent.path.name))
            span = {"from": role, "file": file, "offset": extent.offset, "length": extent.length}
            told.append(span if stripe.rounds == 1 else {**span, "step": step})
        spans += told if stripe.rounds == 1 else [{"rounds": stripe.rounds, "spans": told}]
    if len(spans) == 1 and "rounds" not in spans[0]:
        return {**spans[0], "stored": stored.dtype}
    return {"spans": spans, "stored": stored.dtype}


def dump(head: Mapping[str, Any], tensors: Iterable[tuple[str, Mapping[str, Any]]]) -> bytes:
    """conversion.json's bytes: one line a tensor, since there are hundreds."""
    text = json.dumps(head, indent=2, ensure_ascii=False)[:-2]
    lines = (f"    {json.dumps(name)}: {json.dumps(entry, separators=(', ', ': '))}" for name, entry in tensors)
    return utf8(text + ',\n  "tensors": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def dropped_texts(checkpoint: Checkpoint, more: Iterable[Dropped] = ()) -> list[str]:
    """Drops for people: one line a reason."""
    reasons: dict[str, list[str]] = {}
    for drop in (*checkpoint.dropped, *more):
        reasons.setdefault(drop.reason, []).append(drop.name)
    return [
        f"left out {len(names)} ({reason}): {names[0]}{', …' if len(names) > 1 else ''}"
        for reason, names in reasons.items()
    ]
