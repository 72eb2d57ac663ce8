"""The op that makes floats of FP8 weights and their scales."""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

from llava_convert.core.arrays import FP8, Array
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import widen

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DequantizeFp8:
    """value · scale in float64, which the next op rounds once.

    An E4M3 has 4 significant bits and a scale at most 24, so that the product is exact. `scale` is one number, one a
    row, or one for each `block` of rows and columns (the last of a row or column of blocks may be cut); None: 1.
    """

    scale: StoredTensor | None
    block: tuple[int, int] | None = None
    name = "dequantize_fp8"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FP8:
            raise UnsupportedError(f"cannot dequantise {dtype} by a scale: only {' and '.join(FP8)} are")
        if self.scale is not None:
            self._blocks(shape)
        return "F64", shape

    def _blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many rows and columns one scale is for. Raises InputError where the scales do not fit the weight."""
        assert self.scale is not None
        rows, columns = shape[0] if shape else 1, int(np.prod(shape[1:]))
        found = self.scale.shape
        if self.scale.numel == 1:
            return rows, columns
        if self.scale.numel == rows and found[0] == rows:
            return 1, columns
        high, wide = self.block or (0, 0)
        if high and wide and found == (ceil(rows / high), ceil(columns / wide)):
            return high, wide
        raise InputError(
            f"{self.scale.name} {list(found)} does not fit the weight {list(shape)}: there is one, or one for each "
            "row, or one for each block" + (f" of {high} x {wide}" if high else ""),
            hint="get config and weights of one model",
        )

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        table, row = values_of(dtype), context.first_row
        scales, high, wide = np.ones((1, 1)), shape[0] if shape else 1, 1
        if self.scale is not None:
            high, wide = self._blocks(shape)
            scales = _floats(context.read(self.scale), self.scale.dtype).reshape(-(-max(1, shape[0]) // high), -1)
        for block in blocks:
            found = table[block]
            mine = scales[(row + np.arange(len(block))) // high]
            if mine.shape[1] > 1:
                mine = np.repeat(mine, wide, axis=1)[:, : block.shape[1]]
            with np.errstate(all="ignore"):  # what is not finite in a checkpoint stays so, and casts count it
                found *= mine
            row += len(block)
            yield found

    def inputs(self) -> tuple[StoredTensor, ...]:
        return () if self.scale is None else (self.scale,)

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"op": self.name}
        if self.scale is not None:
            found["scale"] = self.scale.name
        return found | ({"block": list(self.block)} if self.block else {})


def _floats(values: Array, dtype: str) -> NDArray[np.float64]:
    return np.asarray(widen(values, dtype) if dtype == "BF16" else values, np.float64)


@cache
def values_of(dtype: str) -> NDArray[np.float64]:
    """The value of each of the 256 codes of an FP8 type (OCP 8-bit Floating Point Specification, 5.1 and 5.2).

    E4M3 has no infinity, and NaN where exponent and mantissa are all ones; E5M2 is the upper half of a float16.
    """
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).astype(np.uint16).view(np.float16).astype(np.float64)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7))
    sizes[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -sizes, sizes)
