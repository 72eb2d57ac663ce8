"""The ops between floats and ggml's block types.

A block of rows of a quantised tensor is a 2-D array of bytes: (rows, bytes of a row).
"""

from __future__ import annotations

from math import prod
from typing import Any

from llava_convert.core.arrays import Array
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS, StoredTensor, nbytes_of
from llava_convert.core.values import dataclass
from llava_convert.ops import kernels
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import count_nonfinite, widen

# Weights at a time. Two threads, ns a weight of Q4_K: 3.4 with 64 Ki (they wait for the interpreter's lock), 2.6 with
# 256 Ki, 2.5 with more, where their float32 values leave the cache between the passes over them.
_CHUNK = 256 * 1024
# Below this no scale overflows: each is a float16 no larger than the largest weight of its block.
_SAFE = 65504.0


@dataclass(frozen=True, slots=True)
class Quantize:
    """To a block type of ggml's, rows apart, by ggml's own kernels."""

    dtype: str
    name = "quantize"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        weights, _ = QUANTS[self.dtype]
        if dtype not in ("F32", "F16", "BF16"):
            raise UnsupportedError(
                f"cannot quantise {dtype} to {self.dtype}: it is made of F32, F16 or BF16",
                hint="quantise from the full-precision model: a second quantisation adds its error to the first"
                if dtype in QUANTS
                else None,
            )
        if len(shape) < 2:
            raise UnsupportedError(f"cannot quantise a tensor of shape {list(shape)}: only matrices are")
        if shape[-1] % weights:
            raise UnsupportedError(
                f"cannot quantise rows of {shape[-1]} weights to {self.dtype}: its blocks hold {weights}",
                hint="choose a type of smaller blocks (q8_0 and the types q4_0 to q5_1 have 32 weights), or f16",
            )
        return self.dtype, shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        columns = prod(shape[1:])
        step = max(1, _CHUNK // columns)
        for block in blocks:
            made = np.empty((len(block), nbytes_of(self.dtype, columns)), np.uint8)
            for row in range(0, len(block), step):
                values = widen(block[row : row + step], dtype)
                kernels.quantize(self.dtype, values, made[row : row + step])
                # False for NaN too.
                if not (values.max(initial=0) < _SAFE and values.min(initial=0) > -_SAFE):
                    self._judge(values, made[row : row + step], context)
            yield made

    def _judge(self, values: Array, made: Array, context: Context) -> None:
        """Count finite weights whose block overflowed. Raises InputError for weights that are not finite."""
        strange = count_nonfinite(values, "F32")
        if strange:
            raise InputError(
                f"{context.name or 'a tensor'}: {strange} of {values.size:,} values looked at are NaN or infinite, "
                f"and {self.dtype} cannot hold them",
                hint="they spoil the model: get or save the checkpoint again; f16, bf16 and f32 keep them as they are",
            )
        context.loss.overflowed += count_nonfinite(kernels.dequantize(self.dtype, made), "F32")

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class Dequantize:
    """A block type of ggml's as float32: the values that its kernels compute with."""

    name = "dequantize"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in QUANTS:
            raise UnsupportedError(f"cannot dequantise {dtype}: it is not a block type")
        if dtype not in kernels.READABLE:
            raise UnsupportedError(f"cannot dequantise {dtype}: gguf-py does not know how")
        if len(shape) < 2:
            raise UnsupportedError(f"cannot dequantise {dtype} of shape {list(shape)}: only matrices are")
        return "F32", shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        for block in blocks:
            yield kernels.dequantize(dtype, block)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name}
