"""Casts between the float dtypes on flat NumPy arrays: each rounds to nearest even, once.

NumPy has no bfloat16, so a BF16 array is its bits as uint16 here. torch is not needed: casts must not cost
its import (1.3 s, 143 MB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# How each dtype's elements are held in NumPy.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

FLOATS = frozenset(NUMPY_TYPES)


@dataclass(slots=True)
class CastLoss:
    """What a cast lost: finite values that became infinite, nonzero values that became zero."""

    overflowed: int = 0
    flushed: int = 0
    nonfinite: int = 0

    def add(self, other: CastLoss) -> None:
        self.overflowed += other.overflowed
        self.flushed += other.flushed
        self.nonfinite += other.nonfinite


def raw(values: Array) -> memoryview:
    """A contiguous array's bytes, without a copy."""
    return memoryview(values.reshape(-1).view(np.uint8).data)


def widen(values: Array, dtype: str) -> NDArray[np.float32]:
    """F16, BF16 or F32 as float32, exactly; F64 is rounded."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def cast(values: Array, dtype: str, to: str, loss: CastLoss | None = None) -> Array:
    """`values` of `dtype` as `to`, rounded once to nearest even; what is lost is added to `loss`."""
    if dtype == to:
        return values
    if to == "BF16":
        out: Array = _to_bf16(_odd(values) if dtype == "F64" else widen(values, dtype))
    elif dtype == "BF16":
        with np.errstate(over="ignore"):
            out = widen(values, dtype).astype(NUMPY_TYPES[to])
    else:
        with np.errstate(over="ignore"):
            out = values.astype(NUMPY_TYPES[to])
    if loss is not None:
        loss.add(_lost(values, dtype, out, to))
    return out


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # Adding half a unit, less one when the kept last bit is even, rounds to nearest even by carry.
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    out: NDArray[np.uint16] = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        # The carry could turn a NaN into an infinity: keep its sign and set the quiet bit.
        out[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return out


def _odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 as float32 rounded to odd, so that a second rounding to bfloat16 acts as the only one."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = near.view(np.uint32)
    bits = np.where(away & np.isfinite(values), bits - np.uint32(1), bits)
    truncated = bits.view(np.float32)
    inexact = np.isfinite(values) & (truncated.astype(np.float64) != values)
    return np.where(inexact, bits | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def nonfinite_mask(values: Array, dtype: str) -> NDArray[np.bool_]:
    if dtype == "F16":
        # Sixteen times faster than isfinite on float16, which NumPy emulates.
        values = values.view(np.uint16)
    exponent = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}.get(dtype)
    found: NDArray[np.bool_] = ~np.isfinite(values) if exponent is None else (values & exponent) == exponent
    return found


def count_nonfinite(values: Array, dtype: str) -> int:
    return int(np.count_nonzero(nonfinite_mask(values, dtype)))


def _zeros(values: Array, dtype: str) -> int:
    if dtype == "BF16":
        return int(values.size - np.count_nonzero(values << np.uint16(1)))
    if dtype == "F16":
        return int(values.size - np.count_nonzero(values.view(np.uint16) << np.uint16(1)))
    return int(values.size - np.count_nonzero(values))


def _lost(before: Array, dtype: str, after: Array, to: str) -> CastLoss:
    already = count_nonfinite(before, dtype)
    now = count_nonfinite(after, to)
    return CastLoss(now - already, _zeros(after, to) - _zeros(before, dtype), already)
