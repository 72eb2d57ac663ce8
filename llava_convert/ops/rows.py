"""The ops that add rows, take rows away, change their order or make them up."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import cast as cast_values
from llava_convert.ops.cast import widen


@dataclass(frozen=True, slots=True)
class PadRows:
    """Rows up to `rows`: each new one is the mean of all the old ones (summed in float64, in order)."""

    rows: int
    name = "pad_rows"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot add rows to {dtype} weights")
        return dtype, (self.rows, *shape[1:])

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

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

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype in QUANTS:
            raise UnsupportedError(f"cannot take rows away from {dtype} weights", hint="dequantise them first")
        return dtype, (self.rows, *shape[1:])

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

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


@dataclass(frozen=True, slots=True)
class SetRows:
    """Rows that training gave new values: row `rows[i]` becomes row i of `values`, in the type of the others.

    peft trains single tokens of an embedding so (tuners/trainable_tokens/layer.py: `index_copy` of whole rows).
    """

    rows: tuple[int, ...]
    values: StoredTensor
    name = "set_rows"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS or self.values.dtype not in FLOATS:
            raise UnsupportedError(f"cannot set rows of {dtype} weights", hint="give the full-precision base model")
        return _wider(dtype, self.values.dtype), shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        wide = _wider(dtype, self.values.dtype)
        values = context.read(self.values).reshape(len(self.rows), -1)
        row = 0
        for block in blocks:
            made = block.copy() if wide == dtype else cast_values(block, dtype, wide)
            for place, which in enumerate(self.rows):
                if row <= which < row + len(block):
                    one = values[place : place + 1]
                    made[which - row] = (
                        one if self.values.dtype == wide else cast_values(one, self.values.dtype, wide)
                    )[0]
            row += len(block)
            yield made

    def inputs(self) -> tuple[StoredTensor, ...]:
        return (self.values,)

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "rows": list(self.rows), "values": self.values.name}


def _wider(one: str, other: str) -> str:
    """The narrowest type that holds the values of both exactly."""
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"


@dataclass(frozen=True, slots=True)
class RopePermute:
    """Rows of each head from transformers' order (first halves, second halves) to ggml's (pairs), or `back`.

    Rotary embeddings turn pairs of rows: transformers pairs row i with row i + half, ggml's llama row 2i with 2i + 1.
    On weights (rows, columns) and biases (rows,); bytes are moved and nothing else.
    """

    heads: int
    back: bool = False
    name = "rope_permute"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS and (dtype not in QUANTS or len(shape) < 2):
            raise UnsupportedError(f"cannot reorder the rows of {dtype} of shape {list(shape)}")
        if not shape or self.heads < 1 or shape[0] % (2 * self.heads):
            raise UnsupportedError(
                f"cannot reorder shape {list(shape)} for rotary embeddings: its rows are not {self.heads} heads of "
                "two halves each",
                hint="the config's head counts are not those of the weights",
            )
        return dtype, shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return shape[0] // self.heads

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        half = shape[0] // self.heads // 2
        split = (half, 2) if self.back else (2, half)
        for block in blocks:
            yield block.reshape(-1, *split, block.shape[1]).swapaxes(1, 2).reshape(block.shape)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return RopePermute(self.heads, not self.back)

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "heads": self.heads, "back": self.back}


@dataclass(frozen=True, slots=True)
class Plus:
    """`value` added to every weight, in float32: llama.cpp keeps Gemma's norms as what they multiply by, 1 + weight."""

    value: float
    name = "plus"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot add a number to {dtype} weights")
        return "F32", shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        for block in blocks:
            yield widen(block, dtype) + np.float32(self.value)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return Plus(-self.value) if dtype == "F32" else None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "value": self.value}


@dataclass(frozen=True, slots=True)
class Constant:
    """Float32 values that no file holds: one for all elements, or one for each in row-major order.

    Its source is an empty tensor (`constant` makes the two). For small tensors: the values are part of the plan.
    """

    shape: tuple[int, ...]
    values: tuple[float, ...]
    name = "constant"

    def __post_init__(self) -> None:
        if len(self.values) not in (1, prod(self.shape)) or not self.shape:
            raise ValueError(f"{len(self.values)} values for shape {list(self.shape)}")

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return "F32", self.shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 0

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        values = np.asarray(self.values, np.float32)
        yield np.ascontiguousarray(np.broadcast_to(values, prod(self.shape))).reshape(self.shape[0], -1)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "shape": list(self.shape), "values": list(self.values)}


def constant(name: str, shape: tuple[int, ...], values: Sequence[float]) -> tuple[StoredTensor, tuple[Op, ...]]:
    """A tensor of known values, as what a recipe starts from: an empty source, and the op that fills it."""
    return StoredTensor(name, "F32", (0,), ()), (Constant(shape, tuple(map(float, values))),)
