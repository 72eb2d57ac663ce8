"""Casts between the float dtypes on NumPy arrays: each rounds to nearest even, once.

NumPy has no bfloat16, so a BF16 array is its bits as uint16 here. torch is not used: its import alone costs 1.3 s and
143 MB.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from llava_convert.core.arrays import FLOATS, NUMPY_TYPES, Array
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.ops.base import Blocks, CastLoss, Context, Op

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits32 = NDArray[np.uint32]
    Bits16 = NDArray[np.uint16]

# Elements cast at a time. To float16, G elements a second, one thread and two: 0.95 and 1.0 with 64 Ki, 1.2 with
# 128 Ki (each NumPy call hands the interpreter's lock over, and with fewer elements the threads wait for it more). To
# bfloat16 two threads reach 1.3 and 2.0. Beyond, the two scratch arrays leave the cache.
CHUNK = 128 * 1024
# Of float64, what merges make: with fewer the two threads wait for that lock (0.4 G elements a second, 0.75 so).
CHUNK64 = 256 * 1024
# From one type of 16 bits to another, for the same reason: two threads, G elements a second: 1.4 with 64 Ki, 2.5 with
# 128 Ki, 2.9 with 256 Ki.
CHUNK16 = 256 * 1024

_MAGNITUDE = 0x7FFFFFFF
_EXPONENT = 0x7F800000
_ONE, _HALF, _SIGN16, _BELOW16 = 1, 0x7FFF, 0x8000, 0xFFFF
_HALF16 = 0x7FFF
_SHIFT16, _SHIFT13 = 16, 13
_LEAST_EXPONENT = 113 << 23  # 2^-14: below it float16 has one spacing
_ANCHOR = (13 << 23) + 0x0800
# The smallest float32 magnitudes that round to infinity.
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_TOO_LARGE = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
# From the first to the second type of 16 bits: the least magnitude that is normal in both, and how many from there on
# are finite in both.
_NORMAL_IN_BOTH = {("BF16", "F16"): (0x3880, 0x0F00), ("F16", "BF16"): (0x0400, 0x7800)}
_FEW = 8  # one value in so many is looked up beside the others; with more, all are
_F16_PLACES = 0x8FFFE000 - (1 << 32)
_F16_BIAS = 2.0**112
_EXACT = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}
_scratch = threading.local()


@cache
def _u32(number: int) -> np.uint32:
    """A number as the ufuncs take it: they would make it of Python's at every call, 4 % of a cast."""
    return np.uint32(number)


@cache
def _u16(number: int) -> np.uint16:
    return np.uint16(number)


def widen(values: Array, dtype: str) -> NDArray[np.float32]:
    """F16, BF16 or F32 as float32, exactly; F64 is rounded."""
    if dtype == "BF16":
        bits = values.astype(np.uint32)
        return np.left_shift(bits, _u32(_SHIFT16), out=bits).view(np.float32)
    if dtype == "F16" and values.size and not nonfinite_mask(values, dtype).any() and not _flushes_subnormals():
        return _widen_f16(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def _widen_f16(values: Array) -> NDArray[np.float32]:
    """Finite float16 as float32: the bits in their new places, then the exponent's bias by an exact product.

    Four passes run five times as fast as `astype` (0.46 G elements a second).
    """
    bits = values.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _F16_PLACES, out=bits)  # the sign was extended over the three places above the exponent
    wide = bits.view(np.float32)
    return np.multiply(wide, _F16_BIAS, out=wide)


def _flushes_subnormals() -> bool:
    """Whether this thread reads subnormals as zero: a library built with -ffast-math can switch that on at its load."""
    return not (np.array([1], np.uint32).view(np.float32) * _F16_BIAS).any()


def cast(values: Array, dtype: str, to: str, loss: CastLoss | None = None) -> Array:
    """`values` of `dtype` as `to`, rounded once to nearest even; what is lost is added to `loss`."""
    if dtype == to:
        return values
    flat, out = values.reshape(-1), np.empty(values.size, NUMPY_TYPES[to])
    size = CHUNK64 if dtype == "F64" else CHUNK16 if (dtype, to) in _NORMAL_IN_BOTH else CHUNK
    for start in range(0, flat.size, size):
        part = slice(start, start + size)
        lost = _cast(flat[part], dtype, to, out[part])
        if loss is not None:
            loss.add(lost)
    return out.reshape(values.shape)


def _cast(values: Array, dtype: str, to: str, out: Array) -> CastLoss:
    if (dtype, to) in _NORMAL_IN_BOTH:
        flushed = _between_16(values.view(np.uint16), dtype, to, out.view(np.uint16))
        if flushed is not None:
            return CastLoss(flushed=flushed)
    elif dtype == "F64":
        with np.errstate(over="ignore", invalid="ignore"):
            flushed = _from_f64(values, to, out)
        if flushed is not None:
            return CastLoss(flushed=flushed)
    elif to in _TOO_LARGE:
        wide = widen(values, dtype)
        flushed = (_to_f16 if to == "F16" else _to_bf16)(wide, out.view(np.uint16))
        if flushed is not None:
            return CastLoss(flushed=flushed)
    elif dtype in _TOO_LARGE:  # to a wider one: nothing can be lost
        with np.errstate(invalid="ignore"):  # a signalling NaN
            out[:] = widen(values, dtype)
        return CastLoss(nonfinite=count_nonfinite(values, dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        if to == "BF16":
            out[:] = _bf16_with_nan(_odd(values) if dtype == "F64" else widen(values, dtype))
        else:
            out[:] = widen(values, dtype) if dtype == "BF16" else values
    return _lost(values, dtype, out, to)


def _to_f16(values: NDArray[np.float32], out: Bits16) -> int | None:
    """Round into float16's bits and count nonzero values that became zero; None, with nothing done, where a value
    is too large or not finite.

    Adding 2^(e+13), e being the value's exponent (at least float16's least, -14), makes the adder round to float16's
    spacing: the sum's lowest bits then count its units in the last place. Eleven passes within the cache run 2.5 times
    as fast as `astype`, which NumPy does value by value (1.5 GB/s).
    """
    bits = values.view(np.uint32)
    magnitude, anchor = _two_scratch(bits.size)
    np.bitwise_and(bits, _u32(_MAGNITUDE), out=magnitude)
    if magnitude.max(initial=0) >= _TOO_LARGE["F16"]:
        return None
    np.maximum(magnitude, _least_exponents()[: bits.size], out=anchor)
    np.bitwise_and(anchor, _u32(_EXPONENT), out=anchor)
    # 0x0800, in units, turns the exponent's bias of 126 into float16's: -(126 << 10) modulo 2^16.
    np.add(anchor, _u32(_ANCHOR), out=anchor)
    total = magnitude.view(np.float32)
    np.add(total, anchor.view(np.float32), out=total)
    np.right_shift(anchor, _u32(_SHIFT13), out=anchor)
    np.add(magnitude, anchor, out=magnitude)
    np.copyto(out, magnitude, casting="unsafe")
    nonzero = np.count_nonzero(out)
    np.right_shift(bits, _u32(_SHIFT16), out=anchor)
    np.bitwise_and(anchor, _u32(_SIGN16), out=anchor)
    np.bitwise_or(magnitude, anchor, out=magnitude)
    np.copyto(out, magnitude, casting="unsafe")
    return _flushed(bits, int(nonzero))


def _to_bf16(values: NDArray[np.float32], out: Bits16) -> int | None:
    """As `_to_f16`, to bfloat16: adding half a unit, less one when the kept last bit is even, rounds by carry."""
    bits = values.view(np.uint32)
    rounded, last = _two_scratch(bits.size)
    np.bitwise_and(bits, _u32(_MAGNITUDE), out=rounded)
    if rounded.max(initial=0) >= _TOO_LARGE["BF16"]:
        return None
    np.right_shift(bits, _u32(_SHIFT16), out=last)
    np.bitwise_and(last, _u32(_ONE), out=last)
    np.add(last, bits, out=rounded)
    np.add(rounded, _u32(_HALF), out=rounded)
    np.right_shift(rounded, _u32(_SHIFT16), out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    np.bitwise_and(rounded, _u32(_HALF), out=rounded)
    return _flushed(bits, int(np.count_nonzero(rounded)))


def _from_f64(values: NDArray[np.float64], to: str, out: Array) -> int | None:
    """As `_to_f16`, from float64 to any of the others; where None comes back, `out` is to be made anew."""
    if to == "BF16":
        wide = _scratch_of("wide", np.dtype(np.float32), values.size)
        np.copyto(wide, values, casting="unsafe")
        if _to_bf16(wide, out) is None:
            return None
        _round_ties_once(values, wide, out)
    else:
        # One call: NumPy goes value by value to float16, which takes as long as the passes of `_to_f16` do on float64.
        np.copyto(out, values, casting="unsafe")
    bits = out.view(f"u{out.itemsize}")
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    if magnitude.max(initial=0) >= _INFINITY[to]:
        return None
    nonzero = int(np.count_nonzero(magnitude))
    return 0 if nonzero == values.size else int(np.count_nonzero(values)) - nonzero


def _round_ties_once(values: NDArray[np.float64], wide: NDArray[np.float32], out: Bits16) -> None:
    """Round again where the float32 between lies in the middle of two bfloat16 values, which the float64 may not."""
    low, _ = _two_scratch(wide.size)
    np.bitwise_and(wide.view(np.uint32), _u32(_BELOW16), out=low)
    middle = np.flatnonzero(low == _u32(_SIGN16))
    if middle.size:
        out[middle] = _bf16_with_nan(_odd(values[middle]))


def _between_16(bits: Bits16, dtype: str, to: str, out: Bits16) -> int | None:
    """As `_to_f16`, from one type of 16 bits to another.

    What is normal in both takes its new place by integers of 16 bits, at 2.9 G elements a second with two threads; the
    rest (zeros, subnormals, what is not finite) is looked up, at 1.9 where that is everything.
    """
    least, finite = _NORMAL_IN_BOTH[dtype, to]
    moved = _scratch_of("moved", np.dtype(np.uint16), bits.size)
    np.bitwise_and(bits, _u16(_HALF16), out=moved)
    np.subtract(moved, _u16(least), out=moved)
    rest = np.flatnonzero(moved >= _u16(finite))
    if rest.size > bits.size // _FEW:
        np.take(_table(dtype, to), bits, out=out, mode="wrap")  # "raise" would go by a copy of `out`
        return _flushed_16(bits, out, to)
    if to == "F16":  # three bits more of fraction
        np.left_shift(moved, _u16(3), out=moved)
        np.add(moved, _u16(0x0400), out=moved)
    else:  # three bits less: add half a unit, less one where the kept last bit is even
        np.right_shift(moved, _u16(3), out=out)
        np.bitwise_and(out, _u16(_ONE), out=out)
        np.add(moved, out, out=moved)
        np.add(moved, _u16(3), out=moved)
        np.right_shift(moved, _u16(3), out=moved)
        np.add(moved, _u16(0x3880), out=moved)
    np.bitwise_and(bits, _u16(_SIGN16), out=out)
    np.bitwise_or(out, moved, out=out)
    few = bits[rest]
    looked_up = out[rest] = _table(dtype, to)[few]
    return _flushed_16(few, looked_up, to)


def _flushed_16(bits: Bits16, out: Bits16, to: str) -> int | None:
    magnitude = out & _u16(_HALF16)
    if magnitude.max(initial=0) >= _INFINITY[to]:
        return None
    nonzero = int(np.count_nonzero(magnitude))
    return 0 if nonzero == bits.size else int(np.count_nonzero(bits & _u16(_HALF16))) - nonzero


@cache
def _table(dtype: str, to: str) -> Bits16:
    """Every value of a type of 16 bits as the other."""
    wide = widen(np.arange(1 << 16, dtype=np.uint16).view(NUMPY_TYPES[dtype]), dtype)
    if to == "BF16":
        return _bf16_with_nan(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        return wide.astype(np.float16).view(np.uint16)


def _two_scratch(size: int) -> tuple[Bits32, Bits32]:
    """Two arrays of this thread's own, used again and again: fresh ones cost a page fault every 4 KiB."""
    dtype = np.dtype(np.uint32)
    return _scratch_of("one", dtype, size), _scratch_of("other", dtype, size)


@cache
def _least_exponents() -> Bits32:
    """As an array: NumPy's `maximum` with a number goes element by element, and takes four times as long."""
    return np.full(CHUNK, _LEAST_EXPONENT, np.uint32)


def _scratch_of(name: str, dtype: np.dtype[Any], size: int) -> Array:
    held: Array | None = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = np.empty(max(size, CHUNK), dtype)
        setattr(_scratch, name, held)
    return held[:size]


def _flushed(bits: Bits32, nonzero: int) -> int:
    if nonzero == bits.size:
        return 0
    return int(np.count_nonzero(bits & _MAGNITUDE)) - nonzero


def _bf16_with_nan(values: NDArray[np.float32]) -> Bits16:
    bits = values.view(np.uint32)
    rounded = (bits >> _SHIFT16) & _ONE
    rounded += bits
    rounded += _HALF
    rounded >>= _SHIFT16
    out: Bits16 = rounded.astype(np.uint16)
    nan = np.isnan(values)
    # The carry could turn a NaN into an infinity: keep its sign and set the quiet bit.
    out[nan] = (bits[nan] >> _SHIFT16).astype(np.uint16) | np.uint16(0x0040)
    return out


def _odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 as float32 rounded to odd, so that a second rounding to bfloat16 acts as the only one."""
    with np.errstate(over="ignore", invalid="ignore"):
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
            yield cast(block, dtype, self.dtype, context.loss)

    def inputs(self) -> tuple[StoredTensor, ...]:
        return ()

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        return Cast(dtype) if (dtype, self.dtype) in _EXACT else None

    def describe(self) -> dict[str, Any]:
        return {"op": self.name, "dtype": self.dtype}
