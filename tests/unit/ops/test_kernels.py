"""ggml's kernels: bytes that another implementation makes too, values by gguf-py's reader, and life without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import QUANTS
from llava_convert.ops import kernels

RNG = np.random.default_rng(0)
# Root mean square error on normal weights, by gguf-py's reader: each type's own bits, with room for half a bit.
ERRORS = {
    "Q4_0": 0.095, "Q4_1": 0.086, "Q5_0": 0.047, "Q5_1": 0.042, "Q8_0": 0.006,
    "Q2_K": 0.33, "Q3_K": 0.166, "Q4_K": 0.079, "Q5_K": 0.040, "Q6_K": 0.020, "IQ4_NL": 0.084, "IQ4_XS": 0.084,
}  # fmt: skip


Hide = Callable[[Path | None], None]


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hide]:
    """Put another file, or nothing, in place of xllamacpp's library until the test is over."""

    def forget() -> None:
        for cached in (kernels._library, kernels._fastest):
            cached.cache_clear()

    def put(place: Path | None) -> None:
        monkeypatch.setattr(kernels, "_place", lambda: place)
        forget()

    yield put
    forget()


def weights(rows: int = 24, columns: int = 1024) -> np.ndarray:
    """Normal ones, and rows that a kernel may trip over: zeros of both signs, tiny, huge, sparse, all alike."""
    found = RNG.standard_normal((rows, columns)).astype(np.float32)
    found[0] = 0
    found[1] *= 1e-6
    found[2] *= 1e4
    found[3, ::7] = 0
    found[4] = -3
    found[5] = -0.0
    return found


@pytest.mark.parametrize("dtype", sorted(kernels.BY_NUMPY))
def test_against_gguf_py(dtype: str) -> None:
    """The wheel's C and gguf-py's NumPy are two implementations: their bytes are the same."""
    assert "xllamacpp" in kernels.kernels()
    values = weights()
    signless = values + np.float32(0) if dtype in ("Q4_0", "Q5_0") else values  # -0 counts with gguf-py there
    wanted = quants.quantize(signless, GGMLQuantizationType[dtype])
    assert np.array_equal(kernels.quantize(dtype, values), wanted)


@pytest.mark.parametrize("dtype", kernels.NUMBERS)
def test_values_come_back_as_well_as_the_type_can(dtype: str) -> None:
    values = RNG.standard_normal((32, 2048)).astype(np.float32)
    made = kernels.quantize(dtype, values)
    assert made.shape == (32, 2048 // QUANTS[dtype][0] * QUANTS[dtype][1])
    again = quants.dequantize(made, GGMLQuantizationType[dtype])
    error = float(np.sqrt(np.mean((again - values) ** 2)))
    assert ERRORS[dtype] / 2 < error < ERRORS[dtype]
    assert np.array_equal(kernels.dequantize(dtype, made), again)


@pytest.mark.parametrize("dtype", kernels.NUMBERS)
def test_rows_are_apart_and_threads_change_no_byte(dtype: str) -> None:
    values = weights(48, 512)
    whole = kernels.quantize(dtype, values)
    with ThreadPoolExecutor(4) as workers:
        parts = list(workers.map(lambda row: kernels.quantize(dtype, values[row : row + 3]), range(0, 48, 3)))
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    into = np.empty_like(whole)
    assert kernels.quantize(dtype, values, into) is into and into.tobytes() == whole.tobytes()


def test_numbers_are_those_of_the_format() -> None:
    assert {name: GGMLQuantizationType[name].value for name in kernels.NUMBERS} == kernels.NUMBERS
    assert all(gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]] == QUANTS[name] for name in kernels.NUMBERS)


def test_what_gguf_py_reads() -> None:
    for dtype, (_, size) in QUANTS.items():
        blocks = np.zeros((2, 3 * size), np.uint8)
        if dtype in kernels.READABLE:
            assert kernels.dequantize(dtype, blocks).shape == (2, 3 * QUANTS[dtype][0])
        else:
            with pytest.raises(UsageError, match=f"gguf-py cannot read {dtype}"):
                kernels.dequantize(dtype, blocks)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K"])
def test_what_would_end_the_process_in_ggml_is_refused(dtype: str) -> None:
    good = np.zeros((4, 512), np.float32)
    for bad in (good[:, :100], good[:, ::2], good.astype(np.float64), good[0], np.zeros((4, 100), np.float32)):
        with pytest.raises(ValueError, match=dtype):
            kernels.quantize(dtype, bad)
    for out in (np.empty((4, 3), np.uint8), np.empty((4, 512), np.uint8)):
        with pytest.raises(ValueError, match="needs contiguous bytes"):
            kernels.quantize(dtype, good, out)
    assert kernels.quantize(dtype, good[:0]).shape[0] == 0


def test_the_wheel_is_loaded_without_its_python_and_leaves_arithmetic_alone() -> None:
    """A library built with -ffast-math would switch subnormals off in this thread or in those started later."""
    script = """
import sys, threading
import numpy as np
from llava_convert.ops import kernels
from llava_convert.ops.cast import _flushes_subnormals
kernels.quantize("Q4_K", np.ones((1, 256), np.float32))
assert kernels._library() is not None
assert not {"xllamacpp", "gguf", "torch"} & sys.modules.keys()
found = [_flushes_subnormals()]
thread = threading.Thread(target=lambda: found.append(_flushes_subnormals()))
thread.start(); thread.join()
assert found == [False, False], found
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# --- without the wheel


def test_five_types_go_without_the_wheel(hide: Hide) -> None:
    values = weights()
    wanted = {dtype: kernels.quantize(dtype, values) for dtype in kernels.BY_NUMPY}
    hide(None)
    assert kernels.kernels() == "gguf-py's NumPy"
    for dtype, made in wanted.items():
        kernels.require(dtype)
        into = np.empty_like(made)
        assert kernels.quantize(dtype, values, into) is into
        assert into.tobytes() == made.tobytes()


@pytest.mark.parametrize("dtype", ["Q2_K", "Q4_K", "IQ4_NL"])
def test_the_others_need_it(hide: Hide, dtype: str) -> None:
    hide(None)
    for act in (lambda: kernels.require(dtype), lambda: kernels.quantize(dtype, np.zeros((1, 256), np.float32))):
        with pytest.raises(UsageError, match=f"{dtype} needs ggml's own kernels: xllamacpp is not installed") as caught:
            act()
        assert "pip install 'llava-convert[llamacpp]'" in str(caught.value.hint)
        assert caught.value.exit_code == 2


def test_a_library_without_the_kernels_is_not_used(hide: Hide, tmp_path: Path) -> None:
    import numpy._core._multiarray_umath as another

    text = tmp_path / "xllamacpp.so"
    text.write_text("no library")
    for place in (Path(another.__file__), text):
        hide(place)
        assert kernels.kernels() == "gguf-py's NumPy"
        with pytest.raises(UsageError, match="holds no function"):
            kernels.require("Q6_K")
        kernels.require("Q8_0")


def test_types_that_nobody_makes() -> None:
    for dtype in ("IQ2_XXS", "Q8_K", "F16"):
        with pytest.raises(UsageError, match=f"{dtype} is not a type that can be made"):
            kernels.require(dtype)
    for dtype in kernels.NUMBERS:
        kernels.require(dtype)
