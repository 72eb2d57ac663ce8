"""What a conversion did, or would do, told of its plan; and what was published of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_convert.engine.plan import Plan
from llava_convert.model.recipe import Model
from llava_convert.ops.join import every
from llava_convert.ops.lora import MergeLora
from llava_convert.storage.remote.files import Traffic


@dataclass(frozen=True)
class Published:
    """A folder that is on a hub; `compared` file by file with the hub's own listing, where it has one."""

    hub: str
    repo: str
    url: str
    revision: str
    commit: str | None
    files: int
    bytes: int
    skipped: int = field(default=0)  # files that were there already
    compared: bool = field(default=True)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do."""

    source: Path | str
    out: Path | str
    layouts: tuple[str, str]
    why: str
    plan: Plan
    dtype: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    verified: str
    done: bool
    flushed: int = 0
    memory: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    fetched: Traffic = field(default_factory=Traffic)
    published: tuple[Published, ...] = ()

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        ops: dict[str, int] = {}
        for tensor in plan.tensors:
            for name in [op.name for op in every(tensor.ops)] or ["copy"]:
                ops[name] = ops.get(name, 0) + 1
        return {
            "source": str(self.source),
            "out": str(self.out),
            "from": self.layouts[0],
            "to": self.layouts[1],
            "done": self.done,
            "dtype": self.dtype,
            "parts": dict(self.parts),
            "tensors": len(plan.tensors),
            "ops": dict(sorted(ops.items())),
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "bytes_fetched": self.fetched.bytes,
            "peak_memory": self.memory,
            "shards": [{"name": s.name, "size": s.size, "tensors": len(s.tensors)} for s in plan.shards],
            "files": sorted(n for n in (*plan.files, *plan.indexes)),
            "verified": self.verified,
            "flushed_to_zero": self.flushed,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "plan": plan.hash,
            "published": [one.as_json() for one in self.published],
        }


def peak_memory(plan: Plan) -> int:
    """An estimate of the most anonymous memory that the plan takes: interpreter, torch if merging, buffers."""
    pieces = [piece for t in plan.tensors for piece in t.pieces]
    merging = any(isinstance(op, MergeLora) for t in pieces for op in t.ops)
    operands = max((sum(i.numel * 4 for i in op.inputs()) for t in pieces for op in t.ops), default=0)
    whole = max((t.source.nbytes for t in pieces if t.source.strides is not None), default=0)
    return (250 if merging else 60) * 10**6 + 4 * operands + 4 * whole


def part_story(model: Model, plan: Plan, part: str) -> str:
    """Where a part of the output comes from, in a few words."""
    mine = [t for t in plan.tensors if t.canonical.startswith(f"{part}.")]
    if not mine:
        return "not in the output"
    merged = sum(any(isinstance(op, MergeLora) for op in every(t.ops)) for t in mine)
    origins = sorted({t.origin for t in mine})
    if any(".lora_" in t.canonical for t in mine):
        return "LoRA adapter"
    said = " and ".join(origins)
    return f"{said}, LoRA merged into {merged} tensors" if merged else said
