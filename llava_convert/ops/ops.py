"""The closed set of what a conversion may do to a tensor on its way.

A tensor with no op is moved byte by byte and never parsed. What an op is, op.py says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import cast as cast_values
from llava_convert.ops.cast import widen
from llava_convert.ops.quantize import Dequantize as Dequantize
from llava_convert.ops.quantize import Quantize as Quantize
from llava_convert.ops.rows import Constant as Constant
from llava_convert.ops.rows import PadRows as PadRows
from llava_convert.ops.rows import RopePermute as RopePermute
from llava_convert.ops.rows import TakeRows as TakeRows

_EXACT = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}


@dataclass(frozen=True, slots=True)
class Cast:
    """To another float dtype, rounding once to nearest even."""

    dtype: str
    name = "cast"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(
                f"cannot cast {dtype} to {self.dtype}: no arithmetic is done on {dtype}",
                hint="keep its dtype (leave --dtype out where the source decides), or dequantise it first",
            )
        return self.dtype, shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        for block in blocks:
            yield cast_values(block, dtype, self.dtype, context.loss)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return Cast(dtype) if (dtype, self.dtype) in _EXACT else None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class MergeLora:
    """base + (B·A)·scale in float32; with a magnitude (DoRA), each row is then scaled to it.

    `a` is (r, columns), `b` is (rows, r). The sums follow peft's merge: B·A first, then times scale, then
    added, with the base widened to float32; the result is float32 and is cast once, by the next op.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    name = "merge_lora"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot merge LoRA into {dtype} weights", hint="give the full-precision base model")
        return "F32", shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        import torch

        a = torch.from_numpy(widen(context.read(self.a), self.a.dtype).reshape(self.a.shape[0], -1))
        b = torch.from_numpy(widen(context.read(self.b), self.b.dtype).reshape(shape[0], -1))
        magnitude = None
        if self.magnitude is not None:
            magnitude = torch.from_numpy(widen(context.read(self.magnitude), self.magnitude.dtype).reshape(-1, 1))
        row = context.first_row
        for block in blocks:
            base = torch.from_numpy(widen(block, dtype))
            rows = slice(row, row + len(block))
            row = rows.stop
            # In place, in peft's order: two allocations fewer a block made it run five times as fast.
            merged = b[rows] @ a
            merged *= self.scale
            merged += base
            if magnitude is not None:
                norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
                merged = (magnitude[rows] / norm) * merged
            yield merged.numpy()

    def inputs(self) -> tuple[StoredTensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"op": self.name, "a": self.a.name, "b": self.b.name, "scale": self.scale}
        if self.magnitude is not None:
            found["magnitude"] = self.magnitude.name
        return found


OPS: tuple[type[Any], ...] = (Cast, MergeLora, PadRows, TakeRows, RopePermute, Quantize, Dequantize, Constant)
"""Every op there is, for `llava-convert layouts`. A byte-for-byte copy is the absence of ops."""


def constant(name: str, shape: tuple[int, ...], values: Sequence[float]) -> tuple[StoredTensor, tuple[Op, ...]]:
    """A tensor of known values, as what a recipe starts from: an empty source, and the op that fills it."""
    return StoredTensor(name, "F32", (0,), ()), (Constant(shape, tuple(map(float, values))),)


def steps(dtype: str, to: str) -> tuple[Op, ...]:
    """The ops from one dtype to another, quantised or not. What cannot be done, the ops' `result` refuses."""
    if dtype == to:
        return ()
    if to in QUANTS:
        return (Cast("F32"), Quantize(to)) if dtype == "F64" else (Quantize(to),)
    if dtype in QUANTS:
        return (Dequantize(),) if to == "F32" else (Dequantize(), Cast(to))
    return (Cast(to),)
