"""Casts against torch and NumPy, bit by bit, on patterns of every exponent and around every boundary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llava_convert.ops import cast as cast_module
from llava_convert.ops.base import CastLoss
from llava_convert.ops.cast import CHUNK, cast, count_nonfinite, widen

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def float32_patterns() -> NDArray[np.float32]:
    """Every upper half (sign, exponent, seven bits) with lower halves at and beside each place where rounding turns."""
    low = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x5000, 0x7000, 0xA5A5}
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


@pytest.fixture(params=["numpy", "torch"])
def rounder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(cast_module, "_torch", torch if request.param == "torch" else None)
    yield request.param


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
def test_float32_rounds_as_torch_does(rounder: str, to: str) -> None:
    check(float32_patterns(), "F32", to)


@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_finite_float32_in_chunks_without_large_values(rounder: str, to: str) -> None:
    """The fast way alone: the patterns above meet a large value in nearly every chunk."""
    values = float32_patterns()
    values = values[np.abs(values) < 65519]
    assert values.size > 8 * CHUNK
    check(values, "F32", to)


@pytest.mark.parametrize("dtype,to", [("F16", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("BF16", "F16")])
def test_every_half(rounder: str, dtype: str, to: str) -> None:
    values = half_patterns(dtype)
    check(values, dtype, to)
    finite = values[torch.isfinite(as_torch(values, dtype)).numpy()]
    check(finite, dtype, to)
    small = finite[(torch.abs(as_torch(finite, dtype).float()) < 60000).numpy()]
    check(small, dtype, to)


def test_float64_rounds_once() -> None:
    """1 + 2^-8 + 2^-40 lies above the middle of two bfloat16 values; by way of float32 it would be a tie."""
    values = np.array([1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8], np.float64)
    assert [hex(b) for b in cast(values, "F64", "BF16")] == ["0x3f81", "0xbf81", "0x3f80"]


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30])
def test_one_large_value_among_small_ones_is_counted(rounder: str, value: float) -> None:
    values = np.full(CHUNK + 5, 0.25, np.float32)
    values[CHUNK + 3] = value
    loss = CastLoss()
    found = cast(values, "F32", "F16", loss)
    assert (loss.overflowed, loss.flushed, loss.nonfinite) == (1, 0, 0)
    assert found[CHUNK + 3] == np.copysign(np.inf, value)
    assert (np.delete(found, CHUNK + 3) == np.float16(0.25)).all()


def test_just_below_overflow_is_the_largest_finite(rounder: str) -> None:
    below = np.nextafter(np.float32(65520), np.float32(0))
    loss = CastLoss()
    assert cast(np.array([below], np.float32), "F32", "F16", loss)[0] == np.float16(65504)
    assert loss == CastLoss()


def test_shape_is_kept_and_input_left_alone(rounder: str) -> None:
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
