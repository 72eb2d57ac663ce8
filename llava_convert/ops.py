"""The closed set of what a conversion may do to a tensor on its way.

A tensor with no op is moved byte by byte and never parsed. An op is a frozen value that knows what dtype and
shape come out, and turns a stream of row blocks into another, so that no tensor is held whole. A block is a
2-D array: rows are the tensor's first dimension, columns all the others; a 1-D tensor is one column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, cast

import numpy as np

from llava_convert.errors import UnsupportedError
from llava_convert.numerics import FLOATS, NUMPY_TYPES, Array, CastLoss, widen
from llava_convert.numerics import cast as cast_values
from llava_convert.spec import StoredTensor

Blocks = Iterator[Array]
Read = Callable[[StoredTensor], Array]
"""Reads a small tensor whole, in its own shape."""


@dataclass(slots=True)
class Context:
    """What an op needs from the executor: small tensors read whole, and where losses are counted."""

    read: Read
    loss: CastLoss
    first_row: int = 0


class Op(Protocol):
    """One step. `name` is what plans and reports call it."""

    @property
    def name(self) -> str: ...

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of what comes out."""
        ...

    @property
    def row_local(self) -> bool:
        """Whether each row comes from the same row alone, so that rows can be shared out to threads."""
        ...

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        """Turn the blocks from row `context.first_row` on into what comes out."""
        ...

    def inputs(self) -> tuple[StoredTensor, ...]:
        """The tensors that the op reads beside the one it transforms."""
        ...

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        """The op which undoes this one on an input of that dtype and shape, or None when it is lossy."""
        ...

    def describe(self) -> dict[str, Any]:
        """The op as plain data, for the plan's hash and for conversion.json."""
        ...


_EXACT = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}


@dataclass(frozen=True, slots=True)
class Cast:
    """To another float dtype, rounding once to nearest even."""

    dtype: str
    name = "cast"
    row_local = True

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(
                f"cannot cast {dtype} to {self.dtype}: no arithmetic is done on {dtype}",
                hint="keep its dtype (leave --dtype out where the source decides), or dequantise it first",
            )
        return self.dtype, shape

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
    row_local = True

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot merge LoRA into {dtype} weights", hint="give the full-precision base model")
        return "F32", shape

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


@dataclass(frozen=True, slots=True)
class PadRows:
    """Rows up to `rows`: each new one is the mean of all the old ones (summed in float64, in order)."""

    rows: int
    name = "pad_rows"
    row_local = False

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot add rows to {dtype} weights")
        return dtype, (self.rows, *shape[1:])

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        total = np.zeros(prod(shape[1:]), np.float64)
        for block in blocks:
            total += (block if dtype == "F64" else widen(block, dtype)).sum(axis=0, dtype=np.float64)
            yield block
        mean = cast_values((total / shape[0]).reshape(1, -1), "F64", dtype)
        yield np.ascontiguousarray(np.broadcast_to(mean, (self.rows - shape[0], mean.shape[1])))

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return TakeRows(shape[0])

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "rows": self.rows}


@dataclass(frozen=True, slots=True)
class TakeRows:
    """The first `rows` rows: takes away rows which an earlier conversion is known to have added."""

    rows: int
    name = "take_rows"
    row_local = False

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return dtype, (self.rows, *shape[1:])

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        left = self.rows
        for block in blocks:
            if left:
                yield block[:left]
                left -= min(left, len(block))

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "rows": self.rows}


OPS: tuple[type[Any], ...] = (Cast, MergeLora, PadRows, TakeRows)
"""Every op there is, for `llava-convert layouts`. A byte-for-byte copy is the absence of ops."""


def as_array(raw: bytes | bytearray | memoryview, dtype: str, columns: int) -> Array:
    """Raw bytes as a block of rows."""
    if dtype not in NUMPY_TYPES:
        raise UnsupportedError(f"no arithmetic is done on {dtype}")
    return cast(Array, np.frombuffer(raw, NUMPY_TYPES[dtype]).reshape(-1, columns))
