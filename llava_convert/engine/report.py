"""What a conversion did, or would do, told of its plan; and what was published of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from llava_convert.core.values import dataclass
from llava_convert.engine.plan import Plan
from llava_convert.model.checkpoint import Dropped
from llava_convert.model.recipe import Model
from llava_convert.ops.join import every
from llava_convert.ops.lora import MergeLora
from llava_convert.storage.fingerprints import Digest
from llava_convert.storage.remote.files import Traffic


@dataclass(frozen=True)
class Published:
    """A folder on a hub; `compared` is true if it was compared with the hub's own listing, file by file."""

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
        value = dict(vars(self))
        return {"count": value.pop("files"), **value}


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a conversion, or of its dry run.

    `documents` are the sizes of the files that tell of the output, by name; `next` is a command, or a line of Python.
    """

    source: Path | str
    out: Path | str
    layouts: tuple[str, str]
    why: str
    plan: Plan
    documents: Mapping[str, int]
    next: str
    dtype: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    verified: str
    done: bool
    flushed: int = 0
    memory: int = 0
    seconds: float | None = None  # an estimate; None where a network decides
    disk_free: int | None = field(default=None, compare=False)  # bytes, where the output goes; None for a store
    parts: Mapping[str, str] = field(default_factory=dict)
    fetched: Traffic = field(default_factory=Traffic)
    published: tuple[Published, ...] = ()
    source_dtype: str = ""  # of most of the language model
    dropped: tuple[Dropped, ...] = ()
    unchecked: tuple[str, ...] = ()  # files of a hub that were read in parts, so that their sha256 was not compared
    share: tuple[str, ...] | None = None  # the files that were written, where several runs share an output
    # Of files that were checked in full: who passes the output on need not hash what nobody touched since.
    digests: Mapping[str, Digest] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        what = "done" if self.done else "a plan" if self.share is None else "a share"
        counts = f"{len(self.notes)} notes, {len(self.warnings)} warnings"
        return f"Report({self.layouts[0]} → {self.layouts[1]}, {what}, {len(self.files)} files, {counts})"

    @property
    def files(self) -> dict[str, int]:
        """The size of every file of the output, by its name: all are known before the first byte."""
        return {**self.plan.sizes, **self.documents}

    @property
    def dtypes(self) -> str:
        """The dtype of the output, and that of the source where it was another."""
        changed = self.source_dtype and self.source_dtype not in self.dtype.split(", ")
        return f"{self.dtype} (the source: {self.source_dtype})" if changed else self.dtype

    @property
    def bytes_written(self) -> int:
        return sum(self.files.values())

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        tensors = {shard.name: len(shard.tensors) for shard in plan.shards}
        ops: dict[str, int] = {}
        for tensor in plan.tensors:
            for name in [op.name for op in every(tensor.ops)] or ["copy"]:
                ops[name] = ops.get(name, 0) + 1
        return {
            "source": str(self.source),
            "layout": self.layouts[0],
            "why": self.why,
            "out": str(self.out),
            "to": self.layouts[1],
            "done": self.done,
            "dtype": self.dtype,
            "source_dtype": self.source_dtype,
            "parts": {part: {"detail": story} for part, story in self.parts.items()},
            "tensors": len(plan.tensors),
            "ops": dict(sorted(ops.items())),
            "files": [
                {"name": name, "bytes": size, "tensors": tensors.get(name)} for name, size in sorted(self.files.items())
            ],
            "bytes": self.bytes_written,
            "bytes_read": plan.bytes_read,
            "bytes_fetched": self.fetched.bytes,
            "unchecked": list(self.unchecked),
            "peak_memory": self.memory,
            "share": None if self.share is None else list(self.share),
            "estimated_seconds": None if self.seconds is None else round(self.seconds, 1),
            "disk_free": self.disk_free,
            "verified": self.verified,
            "flushed_to_zero": self.flushed,
            "dropped": [{"name": one.name, "reason": one.reason} for one in self.dropped],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "plan": plan.hash,
            "next": self.next,
            "published": [one.as_json() for one in self.published],
        }


def peak_memory(plan: Plan) -> int:
    """An estimate of the most anonymous memory that the plan takes: interpreter, and what four threads hold."""
    pieces = [piece for t in plan.tensors for piece in t.pieces]
    bands = max((op.band_bytes for t in pieces for op in t.ops if isinstance(op, MergeLora)), default=0)
    operands = max((sum(i.numel * 4 for i in op.inputs()) for t in pieces for op in t.ops), default=0)
    whole = max((t.source.nbytes for t in pieces if t.source.strides is not None), default=0)
    return 60 * 10**6 + 4 * (operands + bands + whole)


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
