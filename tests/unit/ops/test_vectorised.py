"""Blocks made sixteen at a time have ggml's bytes, whatever the weights; where they would not, ggml makes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding

from llava_convert.core.tensors import QUANTS
from llava_convert.ops import kernels, lanes, vectorised

TYPES = sorted(kernels.BY_LANES)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Kernels are chosen anew, in the test and after it."""
    kernels._fastest.cache_clear()
    yield
    kernels._fastest.cache_clear()


def ggmls(dtype: str, rows: np.ndarray) -> np.ndarray:
    make = kernels._ggml(dtype)
    assert make is not None
    weights, size = QUANTS[dtype]
    out = np.empty((len(rows), rows.shape[1] // weights * size), np.uint8)
    make(rows, out)
    return out


def by_lanes(dtype: str, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """The blocks, and how many of them ggml made."""
    left = 0

    def make(some: np.ndarray, out: np.ndarray) -> None:
        nonlocal left
        left += len(some)
        assert some.size
        out[:] = ggmls(dtype, some)

    weights, size = QUANTS[dtype]
    out = np.empty((len(rows), rows.shape[1] // weights * size), np.uint8)
    _maker(dtype, make)(rows, out)
    return out, left


def _maker(dtype: str, ggml: kernels.Make) -> kernels.Make:
    """Compiled once for all tests; only what it hands over differs."""
    if dtype not in _made:
        _made[dtype] = vectorised.maker(dtype, lambda rows, out: _over[dtype](rows, out))
    _over[dtype] = ggml
    return _made[dtype]


_made: dict[str, kernels.Make] = {}
_over: dict[str, kernels.Make] = {}


def drawn(kind: str, seed: int, shape: tuple[int, int] = (16, 2048)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    found = {
        "normal": normal * 0.02,
        "bfloat16": (normal * 0.02).astype(np.float32),
        "heavy tails": rng.standard_t(2, shape),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "on a grid, with ties": np.round(normal * 8) / 8,
        "half zeros": normal * rng.integers(0, 2, shape),
        "mostly zeros": normal * (rng.random(shape) < 0.05),
        "sub-blocks of all sizes": normal * np.exp(rng.uniform(-12, 8, (shape[0], shape[1] // 16))).repeat(16, 1),
        "tiny": normal * 1e-7,
        "at ggml's own zero": normal * 1e-15,
        "subnormal": normal * 1e-40,
        "squares overflow": normal * 1e20,
        "alike": np.full(shape, -0.3),
        "zeros": np.zeros(shape),
        "minus zeros": -np.zeros(shape),
    }[kind].astype(np.float32)
    if kind == "bfloat16":
        found = (found.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return np.ascontiguousarray(found)


KINDS = (
    "normal", "bfloat16", "heavy tails", "positive", "negative", "on a grid, with ties", "half zeros", "mostly zeros",
    "sub-blocks of all sizes", "tiny", "at ggml's own zero", "subnormal", "squares overflow", "alike", "zeros",
    "minus zeros",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_bytes_are_ggmls(dtype: str, kind: str) -> None:
    rows = drawn(kind, seed=1)
    made, _ = by_lanes(dtype, rows)
    assert np.array_equal(made, ggmls(dtype, rows))


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "half zeros", "on a grid, with ties"])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_models_are_not_left_to_ggml(dtype: str, kind: str) -> None:
    assert by_lanes(dtype, drawn(kind, seed=2))[1] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(-148, 126),
    st.integers(0, 40),
)
def test_any_finite_weights(dtype: str, seed: int, rows: int, blocks: int, exponent: int, spread: int) -> None:
    """Numbers of random bits around some power of two, of any count of blocks."""
    rng = np.random.default_rng(seed)
    shape = (rows, blocks * 256)
    exponents = np.clip(exponent + rng.integers(-spread, spread + 1, shape), -148, 126)
    values = np.ldexp(rng.uniform(-2, 2, shape), exponents).astype(np.float32)
    made, _ = by_lanes(dtype, values)
    assert np.array_equal(made, ggmls(dtype, values))


@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_that_fill_no_group_are_made_by_ggml(dtype: str) -> None:
    rows = drawn("normal", 3, (1, 256))
    made, left = by_lanes(dtype, rows)
    assert np.array_equal(made, ggmls(dtype, rows))
    full = rows.size // (16 * vectorised.types()[dtype].block) > 0  # a group of sixteen
    assert left == (0 if full else rows.size // QUANTS[dtype][0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_end_nothing(dtype: str, strange: float) -> None:
    """Who asked for them is told afterwards."""
    rows = drawn("normal", 4)
    rows[3, 100] = strange
    made, _ = by_lanes(dtype, rows)
    width = QUANTS[dtype][1] * 2048 // QUANTS[dtype][0]
    assert made.shape == (16, width)
    assert np.array_equal(np.delete(made, 3, axis=0), np.delete(ggmls(dtype, rows), 3, axis=0))


# --- which kernels are used


def test_the_types_that_lanes_make() -> None:
    assert vectorised.types().keys() == kernels.BY_LANES


@pytest.mark.parametrize("dtype", sorted(kernels.NUMBERS))
def test_lanes_are_used_for_the_types_they_make(dtype: str, fresh: None) -> None:
    make = kernels._fastest(dtype)
    assert make is not None
    assert (make.__module__ == vectorised.__name__) == (dtype in TYPES)


@pytest.mark.parametrize("dtype", sorted(set(TYPES) - {"Q8_0"}))  # which adds no product to a sum
def test_other_roundings_than_the_librarys_are_noticed(
    dtype: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a library whose compiler fused products and sums: here it is the lanes that fuse them."""
    plain = kernels.quantize(dtype, drawn("normal", 5))

    def fused(self: lanes.Value, operation: str, other: lanes.Value | float) -> lanes.Value:
        build = getattr(self.code.builder, operation)
        return lanes.Value(self.code, build(self.value, self.code.number(other).value, flags=("contract",)))

    monkeypatch.setattr(lanes.Value, "_with", fused)
    kernels._fastest.cache_clear()
    make = kernels._fastest(dtype)
    assert make is not None
    # A processor without such instructions fuses nothing.
    assert (make.__module__ == kernels.__name__) == bool(binding.get_host_cpu_features().get("fma"))
    assert np.array_equal(kernels.quantize(dtype, drawn("normal", 5)), plain)


def test_without_llvm_ggml_makes_them(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn("normal", 6)
    wanted = kernels.quantize("Q4_K", rows)
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llvmlite" else usual(name))
    kernels._fastest.cache_clear()
    make = kernels._fastest("Q4_K")
    assert make is not None
    assert make.__module__ == kernels.__name__
    assert np.array_equal(kernels.quantize("Q4_K", rows), wanted)


def test_where_made_code_may_not_run_ggml_makes_them(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lanes, "compiled", refuse)
    make = kernels._fastest("Q6_K")
    assert make is not None
    assert make.__module__ == kernels.__name__


def test_llvm_is_loaded_for_these_types_alone() -> None:
    script = """
import sys
import numpy as np
from llava_convert.ops import kernels
rows = np.ones((1, 256), np.float32)
kernels.quantize("Q4_0", rows)
assert "llvmlite" not in sys.modules
kernels.quantize("Q4_K", rows)
assert "llvmlite" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_llvm_that_does_not_load_is_done_without() -> None:
    script = """
import sys
import numpy as np
from llava_convert.ops import kernels
sys.modules["llvmlite.binding"] = None
assert kernels.vectorises("Q4_K")
assert kernels.quantize("Q4_K", np.ones((1, 256), np.float32)).shape == (1, 144)
assert kernels._fastest("Q4_K").__module__ == kernels.__name__
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
