"""FP8 weights and their scales as floats: exact, and rounded once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.ops.base import CastLoss, Context
from llava_convert.ops.cast import Cast
from llava_convert.ops.fp8 import DequantizeFp8, values_of

TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def stored(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, ())


@pytest.mark.parametrize("dtype", TORCH)
def test_every_code_is_what_torch_says(dtype: str) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(TORCH[dtype]).to(torch.float64).numpy()
    found = values_of(dtype)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(wanted[~np.isnan(wanted)]))


def made(op: DequantizeFp8, codes: np.ndarray, scale: np.ndarray | None, *, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """What the op makes of codes given in blocks that end at `cuts`, each range with a stream of its own."""
    found = []
    for first, last in zip((0, *cuts), (*cuts, len(codes)), strict=True):
        context = Context(lambda _: scale, CastLoss(), first)  # type: ignore[arg-type, return-value]
        blocks = (codes[row : min(row + 3, last)] for row in range(first, last, 3))
        found += list(op.stream(blocks, "F8_E4M3", codes.shape, context))
    return np.concatenate(found)


@pytest.mark.parametrize("cuts", [(), (5,), (4, 8)])
@pytest.mark.parametrize("kind", ["none", "scalar", "one", "row", "column", "block"])
def test_each_weight_is_its_value_times_its_scale(kind: str, cuts: tuple[int, ...]) -> None:
    rows, columns, high, wide = 11, 7, 4, 3  # the last block of each row and column is cut
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7F, (rows, columns)).astype(np.uint8) | (rng.integers(0, 2, (rows, columns)) << 7).astype(
        np.uint8
    )
    shape = {"none": (), "scalar": (), "one": (1,), "row": (rows,), "column": (rows, 1), "block": (3, 3)}[kind]
    scale = None if kind == "none" else (rng.random(shape).astype(np.float32) * np.float32(0.01))
    op = DequantizeFp8(None if scale is None else stored("s", "F32", shape), (high, wide))
    assert op.result("F8_E4M3", codes.shape) == ("F64", codes.shape)
    found = made(op, codes, scale, cuts=cuts)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    for r in range(rows):
        for c in range(columns):
            one = {
                "none": 1.0,
                "scalar": scale,
                "one": None if scale is None else scale.reshape(-1)[0],
                "row": scale[r] if kind == "row" else 0,  # type: ignore[index]
                "column": scale[r, 0] if kind == "column" else 0,  # type: ignore[index]
                "block": scale[r // high, c // wide] if kind == "block" else 0,  # type: ignore[index]
            }[kind]
            exact = Fraction(float(values[r, c])) * Fraction(float(one))  # type: ignore[arg-type]
            assert Fraction(float(found[r, c])) == exact


def nearest(value: Fraction, digits: int) -> Fraction:
    """The number of so many binary digits that is nearest to a value, ties to even."""
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (digits + exponent):
        exponent += 1
    while abs(value) < Fraction(2) ** (digits + exponent - 1):
        exponent -= 1
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit


def test_a_product_is_rounded_once() -> None:
    """float32 first would round some of these twice: there are such among them."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0x30, 0x58, (64, 64)).astype(np.uint8)
    scale = (1 + rng.random((64, 1))).astype(np.float32)
    op = DequantizeFp8(stored("s", "F32", (64, 1)))
    wide = made(op, codes, scale)
    context = Context(lambda _: scale, CastLoss())  # type: ignore[arg-type, return-value]
    bits = next(iter(Cast("BF16").stream(iter([wide]), "F64", wide.shape, context)))
    found = (bits.astype(np.uint32) << 16).view(np.float32)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    for r in range(64):
        for c in range(64):
            exact = Fraction(float(values[r, c])) * Fraction(float(scale[r, 0]))
            assert Fraction(float(found[r, c])) == nearest(exact, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="I8"):
        DequantizeFp8(None).result("I8", (2, 2))
    op = DequantizeFp8(stored("x.weight_scale", "F32", (3, 3)), (128, 128))
    with pytest.raises(InputError, match=r"x\.weight_scale \[3, 3\] does not fit the weight \[4, 4\]"):
        op.result("F8_E4M3", (4, 4))


def test_the_reference_rounds_as_torch_does() -> None:
    values = [Fraction(float(v)) for v in torch.rand(200, dtype=torch.float32)]
    assert [nearest(v, 8) for v in values] == [
        Fraction(float(torch.tensor(float(v), dtype=torch.float32).bfloat16())) for v in values
    ]


def test_it_says_what_it_did(tmp_path: Path) -> None:
    scale = stored("a.weight_scale_inv", "F32", (1, 1))
    op = DequantizeFp8(scale, (128, 128))
    assert op.describe() == {"op": "dequantize_fp8", "scale": "a.weight_scale_inv", "block": [128, 128]}
    assert op.inputs() == (scale,) and DequantizeFp8(None).inputs() == ()
