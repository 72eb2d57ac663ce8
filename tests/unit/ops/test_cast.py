"""Casts against torch and whole numbers, bit by bit, on patterns of every exponent and around every boundary."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llava_convert.core.arrays import NUMPY_TYPES
from llava_convert.ops import cast as cast_module
from llava_convert.ops.base import CastLoss
from llava_convert.ops.cast import CHUNK, CHUNK64, cast, count_nonfinite, widen
from tests.exact import FORMATS, round_to

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def float32_patterns() -> NDArray[np.float32]:
    """Every upper half (sign, exponent, seven bits) with lower halves at and beside each place where rounding turns."""
    odd = range(0x1000, 0x10000, 0x2000)  # the middles of float16; of bfloat16 it is 0x8000
    low = {0, 0x1FFF, 0x2000, 0x8000, 0xA5A5, 0xFFFF, *odd} | {
        at + by for at in (0, 0x8000, *odd) for by in (-1, 1) if at + by >= 0
    }
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    return np.concatenate([high | np.uint32(bits) for bits in sorted(low)]).view(np.float32)


def half_patterns(dtype: str) -> NDArray[np.generic]:
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits.view(np.float16) if dtype == "F16" else bits


def as_torch(values: NDArray[np.generic], dtype: str) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def bits_of(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.view(f"u{values.itemsize}")


def check(values: NDArray[np.generic], dtype: str, to: str) -> None:
    loss = CastLoss()
    found = cast(values, dtype, to, loss)
    wanted = as_torch(values, dtype).to(TORCH[to])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    theirs = wanted.view(integers).numpy()
    nan = torch.isnan(as_torch(values, dtype)).numpy()
    unequal = np.flatnonzero((bits_of(found) != bits_of(theirs)) & ~nan)
    assert unequal.size == 0, f"{dtype} {bits_of(values)[unequal[0]]:#x} became {bits_of(found)[unequal[0]]:#x}"
    kept = torch.isnan(as_torch(found, to)).numpy()
    assert (kept == nan).all(), "a NaN stays a NaN, and nothing else becomes one"
    finite_before = torch.isfinite(as_torch(values, dtype))
    nonzero_before = as_torch(values, dtype) != 0
    assert loss.overflowed == int((finite_before & torch.isinf(wanted)).sum())
    assert loss.nonfinite == int((~finite_before).sum())
    assert loss.flushed == int((nonzero_before & (wanted == 0)).sum())


@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_float32_rounds_as_torch_does(to: str) -> None:
    check(float32_patterns(), "F32", to)


@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_finite_float32_in_chunks_without_large_values(to: str) -> None:
    """The fast way alone: the patterns above meet a large value in nearly every chunk."""
    values = float32_patterns()
    values = values[np.abs(values) < 65519]
    assert values.size > 8 * CHUNK
    check(values, "F32", to)


@pytest.mark.parametrize("dtype,to", [("F16", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("BF16", "F16")])
def test_every_half(dtype: str, to: str) -> None:
    values = half_patterns(dtype)
    check(values, dtype, to)
    finite = values[torch.isfinite(as_torch(values, dtype)).numpy()]
    check(finite, dtype, to)
    small = finite[(torch.abs(as_torch(finite, dtype).float()) < 60000).numpy()]
    check(small, dtype, to)


@pytest.mark.parametrize("dtype,to", [("F16", "BF16"), ("BF16", "F16")])
def test_each_half_that_is_seldom_among_those_that_are_normal_in_both(dtype: str, to: str) -> None:
    every = half_patterns(dtype)
    normal = np.abs(as_torch(every, dtype).float().numpy())
    normal = np.isfinite(normal) & (normal >= 2.0**-14) & (normal < 65536)
    often, seldom = every[normal], every[~normal]
    for some in np.array_split(seldom, -(-seldom.size // (often.size // 16))):
        mixed = np.concatenate([often, some])
        np.random.default_rng(some.size).shuffle(mixed)
        check(mixed, dtype, to)


def finite_values(dtype: str) -> NDArray[np.float64]:
    """Every magnitude of a 16-bit type from 0 to its largest, and what would follow that; of float32 some thousands."""
    significand, _, width = FORMATS[dtype]
    infinity = (1 << width - 1) - (1 << significand - 1)
    if dtype == "F32":
        near = np.arange(-40, 40)
        every = np.unique(np.concatenate([(exponent << 23) + near for exponent in range(255)]))
        return every.clip(0, infinity - 1).astype(np.uint32).view(np.float32).astype(np.float64)
    values = widen(np.arange(infinity, dtype=np.uint16).view(NUMPY_TYPES[dtype]), dtype).astype(np.float64)
    return np.append(values, 2.0 ** (1 << width - significand - 1))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_float64_around_every_middle_of_two_values(to: str, sign: int) -> None:
    """What each side of a middle must become is known beforehand. By way of float32 both would become the middle."""
    values = finite_values(to)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    assert ((middle - low) == (high - middle)).all()
    bits = np.arange(len(low), dtype=np.uint16)
    cases = [
        (np.nextafter(middle, 0), bits),
        (np.nextafter(middle, np.inf), bits + 1),
        (middle, bits + bits % 2),
        (middle * (1 - 2.0**-40), bits),
        (middle * (1 + 2.0**-40), bits + 1),
        (low, bits),
    ]
    assert (np.float32(cases[0][0]) == middle).all() and (np.float32(cases[1][0]) == middle).all()
    assert len(low) == {"F16": 31_744, "BF16": 32_640}[to]
    for given, wanted in cases:
        loss = CastLoss()
        found = bits_of(cast(sign * given, "F64", to, loss))
        assert (found == (wanted | (0x8000 if sign < 0 else 0))).all()
        infinite = np.flatnonzero(wanted == len(low))
        assert loss.overflowed == len(infinite) <= 1 and loss.nonfinite == 0
        assert loss.flushed == np.count_nonzero((given != 0) & (wanted == 0))
        # Without the one that overflows, which sends its chunk the slow way.
        kept = wanted != len(low)
        assert (bits_of(cast(sign * given[kept], "F64", to)) == found[kept]).all()


@pytest.mark.parametrize("to", ["F16", "BF16", "F32"])
def test_float64_against_whole_numbers(to: str) -> None:
    """Random bits at every exponent that matters, at random and just around values of the type and their middles."""
    generator = np.random.default_rng(5)
    _, least, width = FORMATS[to]
    exponents = np.arange(max(least - 30, -1022), (1 << 4 if to == "F16" else 1 << 7) + 2)
    random = np.ldexp(generator.uniform(1, 2, (len(exponents), 12)), exponents[:, None]).reshape(-1)
    values = finite_values(to)
    chosen = generator.choice(len(values) - 1, 3000)
    middle = (values[chosen] + values[chosen + 1]) / 2 if to != "F32" else values[chosen] * (1 + 2.0**-24)
    given = np.concatenate(
        [random, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), [5e-324, 0.0, 1e308]]
    )
    given *= generator.choice([-1, 1], given.size)
    given = np.append(given, 0.0)
    loss = CastLoss()
    found = bits_of(cast(given, "F64", to, loss)).tolist()
    for value, bits in zip(given.tolist(), found, strict=True):
        wanted = round_to(Fraction(value), to) | ((1 << width - 1) if np.signbit(value) else 0)
        assert bits == wanted, f"{value.hex()} became {bits:#x}, not {wanted:#x}"
    magnitudes = np.array(found) & (1 << width - 1) - 1
    infinity = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[to]
    assert loss.overflowed == np.count_nonzero(magnitudes == infinity) > 0 and loss.nonfinite == 0
    assert loss.flushed == np.count_nonzero((given != 0) & (magnitudes == 0)) > 0


@pytest.mark.parametrize("to", ["F16", "BF16", "F32"])
def test_float64_that_is_not_finite(to: str) -> None:
    """Among others and in a chunk of their own; a NaN whose payload is low stays one."""
    payloads = np.array([0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF, 0x7FF8000000000000], np.uint64).view(np.float64)
    given = np.concatenate([payloads, [np.inf, -np.inf, 1.0, 0.25, 1e-300]])
    loss = CastLoss()
    found = cast(given, "F64", to, loss)
    wide = widen(found, to)
    assert np.isnan(wide).tolist() == [True] * 3 + [False] * 5
    assert wide[3:].tolist() == [np.inf, -np.inf, 1.0, 0.25, 0.0]
    assert (loss.overflowed, loss.flushed, loss.nonfinite) == (0, 1, 5)


@pytest.mark.parametrize("to", ["F16", "BF16", "F32"])
def test_float64_in_many_chunks(to: str) -> None:
    values = np.random.default_rng(2).uniform(0.001, 1, 2 * CHUNK64 + 77)
    values[CHUNK64 + 5] = 1e39
    loss = CastLoss()
    found = widen(cast(values.reshape(1, -1), "F64", to, loss), to)[0].astype(np.float64)
    assert loss.overflowed == 1 and np.isinf(found[CHUNK64 + 5])
    error = np.abs(np.delete(found, CHUNK64 + 5) / np.delete(values, CHUNK64 + 5) - 1)
    assert error.max() <= 2.0 ** -FORMATS[to][0]


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30])
def test_one_large_value_among_small_ones_is_counted(value: float) -> None:
    values = np.full(CHUNK + 5, 0.25, np.float32)
    values[CHUNK + 3] = value
    loss = CastLoss()
    found = cast(values, "F32", "F16", loss)
    assert (loss.overflowed, loss.flushed, loss.nonfinite) == (1, 0, 0)
    assert found[CHUNK + 3] == np.copysign(np.inf, value)
    assert (np.delete(found, CHUNK + 3) == np.float16(0.25)).all()


def test_just_below_overflow_is_the_largest_finite() -> None:
    below = np.nextafter(np.float32(65520), np.float32(0))
    loss = CastLoss()
    assert cast(np.array([below], np.float32), "F32", "F16", loss)[0] == np.float16(65504)
    assert loss == CastLoss()


def test_shape_is_kept_and_input_left_alone() -> None:
    values = np.linspace(-1, 1, 3 * CHUNK, dtype=np.float32).reshape(3, CHUNK)
    before = values.copy()
    found = cast(values, "F32", "F16")
    assert found.shape == (3, CHUNK)
    assert (values == before).all()
    assert (found.view(np.uint16) == before.astype(np.float16).view(np.uint16)).all()


def test_nothing_to_cast() -> None:
    assert cast(np.empty((0, 4), np.float32), "F32", "F16", CastLoss()).shape == (0, 4)
    assert widen(np.empty((0, 4), np.float16), "F16").shape == (0, 4)


def test_widening_where_subnormals_read_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library built with -ffast-math can switch subnormals off for the thread; float16's must survive it."""
    values = half_patterns("F16")
    finite = values[np.isfinite(values)]
    wanted = finite.astype(np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert cast_module._flushes_subnormals()
        found = widen(finite, "F16")
    finally:
        torch.set_flush_denormal(False)
    assert (found.view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_count_nonfinite(dtype: str) -> None:
    values = np.array([1.0, np.inf, -np.inf, np.nan, 0.0], np.float32)
    assert count_nonfinite(cast(values, "F32", dtype), dtype) == 3
