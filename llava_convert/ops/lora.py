"""The op that merges a LoRA into the weight it adapts, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_convert.core.arrays import FLOATS, Array
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.ops.base import Blocks, Context, Op
from llava_convert.ops.cast import widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One product makes so many rows and columns, cut at multiples of these: how BLAS sums an element depends on the shape
# of the product, and this one depends on the tensor's shape alone. 1 MB of float64 stays in the cache: on one core
# 64 whole rows of 14,336 columns ran at 33 to 42 GFLOP/s, these at 45 to 49 (50 at best), ranks 64 to 512.
ROWS, COLUMNS = 128, 1024
_ULP32 = 2.0**-24  # what one rounding to float32 may be off, relative to the value


@dataclass(frozen=True, slots=True)
class MergeLora:
    """base + (B·A)·scale in float64; with a magnitude (DoRA), each row is then scaled to it.

    `a` is (rank, columns), `b` is (rows, rank); all widen to float64 exactly. The result is float64, which the next op
    rounds once. It is off by a few 2^-53 of the product's size, so that what is cast to 16 bits is the exact merge
    correctly rounded, but for less than one weight in 2^33 (in float32: 2^20). Threads and blocks change no bit of it.
    BLAS has other kernels for other kinds of CPU, which sum in another order: as few weights differ for that.

    An `embedding` keeps its rows as columns: `a` is (rank, rows), `b` is (columns, rank), and their product is turned
    (peft's lora/layer.py, Embedding.get_delta_weight).

    `margin` is for `verify`: so many times what a merge in float32 may be off is added.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    margin: int = 0
    embedding: bool = False
    name = "merge_lora"

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if dtype not in FLOATS:
            raise UnsupportedError(f"cannot merge LoRA into {dtype} weights", hint="give the full-precision base model")
        return "F64", shape

    def rows_together(self, shape: tuple[int, ...]) -> int:
        return 1

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        a, b = _read(self.a, context), _read(self.b, context)
        if self.embedding:
            a, b = b.T, a.T
        magnitude = None if self.magnitude is None else _read(self.magnitude, context)
        lengths = np.linalg.norm(a.astype(np.float64), axis=0) if self.margin else None
        product = _Product(a, b, self.scale)
        # One array for all blocks: a fresh one would be paged in each time.
        room = np.empty((0, 0))
        row = context.first_row
        with np.errstate(all="ignore"):  # what is not finite in a checkpoint stays so, and casts count it
            for block in blocks:
                if len(room) < len(block):
                    room = np.empty(block.shape)
                merged, rows = room[: len(block)], slice(row, row + len(block))
                for found, part in product.rows(rows):
                    np.add(found, _floats(block[part], dtype), out=merged[part])
                spread = None if lengths is None else _spread(product.factors(rows), lengths, block, dtype)
                if magnitude is not None:
                    norms = _norms(merged)
                    scales = magnitude[rows] / norms
                    merged *= scales
                    if spread is not None:
                        relative = _ULP32 * (3 + np.sqrt(block.shape[1])) + _norms(spread) / norms
                        spread = spread * np.abs(scales) + relative * np.abs(merged)
                if spread is not None:
                    merged += np.nan_to_num(spread, copy=False, nan=0.0, posinf=0.0) * self.margin
                row = rows.stop
                yield merged

    @property
    def band_bytes(self) -> int:
        """What a thread holds of the product at a time."""
        columns = self.b.shape[0] if self.embedding else self.a.numel // max(1, self.a.shape[0])
        return ROWS * columns * 8

    def inputs(self) -> tuple[StoredTensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return None

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"op": self.name, "a": self.a.name, "b": self.b.name, "scale": self.scale}
        if self.magnitude is not None:
            found["magnitude"] = self.magnitude.name
        if self.embedding:
            found["embedding"] = True
        return found


def _read(tensor: StoredTensor, context: Context) -> Array:
    """A factor as (rows, columns), kept in a narrow type: in float64 those of rank 512 would take 60 MB a thread."""
    return _floats(context.read(tensor), tensor.dtype).reshape(tensor.shape[0], -1)


def _floats(values: Array, dtype: str) -> Array:
    """Values in a type that NumPy widens exactly as it computes."""
    return widen(values, dtype) if dtype == "BF16" else values


class _Product:
    """B·A·scale in float64, made band by band of ROWS rows, whatever rows are asked for; the last band is kept."""

    def __init__(self, a: Array, b: Array, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale
        self.band = -1
        self.made = np.empty((min(ROWS, len(b)), a.shape[1]))
        self.columns = np.empty((len(a), COLUMNS))

    def factors(self, rows: slice) -> NDArray[np.float64]:
        """B·scale."""
        found: NDArray[np.float64] = self.b[rows].astype(np.float64)
        found *= self.scale
        return found

    def rows(self, rows: slice) -> Iterator[tuple[NDArray[np.float64], slice]]:
        """These rows in pieces, each with its place among them; a piece is gone when the next is asked for."""
        row = rows.start
        while row < rows.stop:
            band, within = divmod(row, ROWS)
            if band != self.band:
                self._make(band)
            piece = self.made[within : within + rows.stop - row]
            yield piece, slice(row - rows.start, row - rows.start + len(piece))
            row += len(piece)

    def _make(self, band: int) -> None:
        factors = self.factors(slice(band * ROWS, (band + 1) * ROWS))
        for left in range(0, self.a.shape[1], COLUMNS):
            narrow = self.a[:, left : left + COLUMNS]
            wide = self.columns[:, : narrow.shape[1]]
            np.copyto(wide, narrow)
            np.matmul(factors, wide, out=self.made[: len(factors), left : left + COLUMNS])
        self.band = band


def _norms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The length of each row, as a column."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", values, values))[:, None])


def _spread(
    factors: NDArray[np.float64], lengths: NDArray[np.float64], block: Array, dtype: str
) -> NDArray[np.float64]:
    """How far a merge in float32 may lie from the exact one, by element; `lengths` are those of A's columns.

    A sum of r products is off by r roundings of at most |b|·|a| (Higham, Accuracy and Stability, 3.5, with Cauchy's
    inequality); the scale, its product and the sum round once each, and the sum rounds the base too.
    """
    of_product = _ULP32 * (factors.shape[1] + 3) * np.linalg.norm(factors, axis=1)
    spread: NDArray[np.float64] = np.multiply.outer(of_product, lengths)
    spread += _ULP32 * np.abs(_floats(block, dtype).astype(np.float64))
    return spread
