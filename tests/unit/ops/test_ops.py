"""Ops: what each says will come out comes out, in the bits that torch or whole numbers give, however rows are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llava_convert.core.arrays import FP8, NUMPY_TYPES, as_array
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import QUANTS, TORCH_NAMES, Extent, StoredTensor, nbytes_of
from llava_convert.model.recipe import Recipe
from llava_convert.ops import OPS, steps
from llava_convert.ops.base import CastLoss, Context, Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.fp8 import DequantizeFp8
from llava_convert.ops.join import Chain, Join, Part
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Dequantize, Quantize
from llava_convert.ops.rows import Constant, PadRows, Plus, RopePermute, SetRows, TakeRows, constant
from tests.exact import fractions, merged, round_to

FLOATS = ("F16", "BF16", "F32", "F64")
TORCH = {dtype: getattr(torch, TORCH_NAMES[dtype]) for dtype in FLOATS}
Arrays = dict[str, Any]


def stored(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, (Extent(Path("x"), 0, nbytes_of(dtype, int(np.prod(shape)))),))


def to_array(tensor: torch.Tensor) -> Any:
    """A tensor as the package holds it: bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_tensor(array: Any, dtype: str) -> torch.Tensor:
    found = torch.from_numpy(np.ascontiguousarray(array))
    return found.view(torch.bfloat16) if dtype == "BF16" else found


def stream(op: Op, tensor: torch.Tensor, dtype: str, *, cuts: Sequence[int] = (), arrays: Arrays | None = None) -> Any:
    """What the op makes of a tensor whose rows come in blocks that end at `cuts`."""
    whole = to_array(tensor).reshape(tensor.shape[0], -1)

    def blocks() -> Iterator[Any]:
        start = 0
        for end in (*cuts, len(whole)):
            if end > start:
                yield whole[start:end]
            start = end

    context = Context(lambda wanted: (arrays or {})[wanted.name], CastLoss())
    made = [np.array(block) for block in op.stream(blocks(), dtype, tuple(tensor.shape), context)]
    out_dtype, shape = op.result(dtype, tuple(tensor.shape))
    found = np.concatenate(made)
    assert found.dtype == NUMPY_TYPES[out_dtype]
    return found.reshape(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype == other.dtype and one.shape == other.shape
    return to_array(one).tobytes() == to_array(other).tobytes()


# --- cast


def random_bits(dtype: str, count: int) -> torch.Tensor:
    """Every kind of value: NaN, infinities, zeros of both signs, the subnormal and the ordinary."""
    size = nbytes_of(dtype, 1)
    raw = bytearray(np.random.default_rng(3).integers(0, 256, count * size, np.uint8).tobytes())
    return torch.frombuffer(raw, dtype=TORCH[dtype])


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_cast_against_torch(dtype: str, to: str) -> None:
    values = torch.cat([random_bits(dtype, 40_000), torch.tensor([0.0, -0.0, 1.0, 65504, 65520, 1e-8, 3.4e38])])
    values = values.to(TORCH[dtype])
    op = Cast(to)
    assert op.result(dtype, (7, 2)) == (to, (7, 2))
    found = to_tensor(stream(op, values.reshape(-1, 1), dtype, cuts=(5, 1000)), to).reshape(-1)
    wanted = values.to(TORCH[to])
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    assert same_bits(found[~nan], wanted[~nan])


def test_cast_to_bfloat16_from_float64_rounds_once() -> None:
    """By way of float32 (as torch goes) 1 + 2^-8 + 2^-40 would round to 1: first to the tie, then to even."""
    value = torch.tensor([[1 + 2.0**-8 + 2.0**-40], [1 + 2.0**-8], [-(1 + 2.0**-8 + 2.0**-40)]], dtype=torch.float64)
    found = to_tensor(stream(Cast("BF16"), value, "F64"), "BF16").float().flatten().tolist()
    assert found == [1 + 2.0**-7, 1.0, -(1 + 2.0**-7)]


def test_cast_counts_what_it_loses() -> None:
    loss = CastLoss()
    values = np.array([[1e6], [1e-12], [0.0], [np.inf], [np.nan], [1.0]], np.float32)
    list(Cast("F16").stream(iter([values]), "F32", (6, 1), Context(lambda _: None, loss)))
    assert (loss.overflowed, loss.flushed, loss.nonfinite) == (1, 1, 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cast_inverse_only_where_it_is_exact(dtype: str) -> None:
    values = random_bits(dtype, 5000).reshape(-1, 10)
    for to in FLOATS:
        inverse = Cast(to).inverse(dtype, (500, 10))
        wider = (dtype, to) in {(a, b) for a in ("F16", "BF16") for b in ("F32", "F64")} | {("F32", "F64")}
        assert (inverse == Cast(dtype)) if wider else inverse is None
        if inverse is not None:
            there = stream(Cast(to), values, dtype)
            back = to_tensor(stream(inverse, to_tensor(there, to), to), dtype)
            kept = ~values.isnan()
            assert same_bits(back[kept], values[kept])


LORA_OP = MergeLora(stored("a", "F32", (1, 2)), stored("b", "F32", (4, 1)), 1.0)


@pytest.mark.parametrize("op", [Cast("F16"), PadRows(8), LORA_OP], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["I64", "U8", "F8_E4M3", "BOOL"])
def test_no_arithmetic_on_other_dtypes(op: Op, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=dtype):
        op.result(dtype, (4, 2))
    if dtype not in FP8:  # which are read to make wider floats of them
        with pytest.raises(UnsupportedError, match=dtype):
            as_array(b"\0" * 8, dtype, 1)


# --- LoRA


def merge(dtype: str, rank: int, *, rows: int = 200, columns: int = 48, dora: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(rows, columns, generator=generator).to(TORCH[dtype])
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    arrays: Arrays = {"a": to_array(a), "b": to_array(b)}
    magnitude = None
    if dora:
        arrays["m"] = to_array(torch.rand(rows, generator=generator) + 0.5)
        magnitude = stored("m", "F32", (rows,))
    op = MergeLora(stored("a", "F32", (rank, columns)), stored("b", "F32", (rows, rank)), 16 / rank, magnitude)
    return op, base, a, b, arrays


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_is_the_exact_one_rounded_once(dtype: str, rank: int) -> None:
    """To every narrower type, bit by bit, against whole numbers; in float64 to within the roundings of its sums."""
    op, base, a, b, arrays = merge(dtype, rank, rows=150, columns=40)
    op = replace(op, scale=0.3)  # a scale that is no power of two is rounded into the product
    exact = merged(base.double(), a, b, 0.3)
    found = stream(op, base, dtype, arrays=arrays)
    largest = float(base.abs().max()) + 0.3 * float((b.abs() @ a.abs()).max())
    assert max(map(abs, (fractions(found) - exact).flat)) <= (rank + 3) * 2.0**-53 * largest
    for to in ("F16", "BF16", "F32"):
        wanted = [round_to(value, to) for value in exact.flat]
        made = stream(Cast(to), torch.from_numpy(found), "F64")
        assert made.view(f"u{made.itemsize}").reshape(-1).tolist() == wanted
    assert not np.array_equal(found, base.double().numpy())


def test_nothing_is_lost_by_way_of_float32() -> None:
    """base + b·a lies just above the middle between two float16 values; as a float32 it is the middle."""
    base, a, b = np.float16([[1.0]]), np.float32([[2.0**-11]]), np.float32([[1 + 2.0**-20]])
    op = MergeLora(stored("a", "F32", (1, 1)), stored("b", "F32", (1, 1)), 1.0)
    found = stream(op, torch.from_numpy(base), "F16", arrays={"a": a, "b": b})
    assert found.tolist() == [[1 + 2.0**-11 + 2.0**-31]]
    assert np.float32(found).tolist() == [[1 + 2.0**-11]]
    assert stream(Cast("F16"), torch.from_numpy(found), "F64").tolist() == [[1 + 2.0**-10]]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_row_blocks_give_the_bits_of_the_whole(rank: int, dora: bool) -> None:
    """Products are cut at rows of the tensor, wherever blocks are cut."""
    op, base, _, _, arrays = merge("F32", rank, rows=650, columns=1100, dora=dora)
    whole = stream(op, base, "F32", arrays=arrays)
    for cuts in ((128, 256, 384, 512, 640), (1, 2, 3), (127, 129, 300), (64, 65, 640)):
        assert stream(op, base, "F32", cuts=cuts, arrays=arrays).tobytes() == whole.tobytes()


def test_merge_starts_at_any_row() -> None:
    """Rows are shared out to threads: a task that starts in the middle takes the rows of B from there."""
    op, base, _, _, arrays = merge("F32", 8)
    context = Context(lambda wanted: arrays[wanted.name], CastLoss(), first_row=70)
    (found,) = op.stream(iter([to_array(base)[70:192]]), "F32", (200, 48), context)
    assert np.array_equal(found, stream(op, base, "F32", arrays=arrays)[70:192])


def test_merge_of_half_precision_adapters() -> None:
    op, base, a, b, arrays = merge("F32", 8)
    halves = {"a": to_array(a.bfloat16()), "b": to_array(b.half())}
    op = MergeLora(stored("a", "BF16", (8, 48)), stored("b", "F16", (200, 8)), 2.0)
    found = torch.from_numpy(stream(op, base, "F32", arrays=halves))
    wanted = base.double() + (b.half().double() @ a.bfloat16().double()) * 2
    assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
    assert set(arrays) == set(halves)


def test_two_adapters_are_merged_without_rounding_between() -> None:
    op, base, a, b, arrays = merge("BF16", 8)
    first = to_tensor(stream(op, base, "BF16", arrays=arrays), "F64")
    found = torch.from_numpy(stream(op, first, "F64", arrays=arrays))
    assert torch.allclose(found, base.double() + (b.double() @ a.double()) * 4, rtol=1e-14, atol=1e-14)


def test_merge_into_a_convolution() -> None:
    """A patch embedding's LoRA is a small convolution and one of a single pixel: flattened it is the same product."""
    generator = torch.Generator().manual_seed(0)
    base, a = torch.randn(32, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    b = torch.randn(32, 2, 1, 1, generator=generator)
    op = MergeLora(stored("a", "F32", (2, 3, 4, 4)), stored("b", "F32", (32, 2, 1, 1)), 0.5)
    found = torch.from_numpy(stream(op, base, "F32", arrays={"a": to_array(a), "b": to_array(b)}))
    product = (b.double().flatten(1) @ a.double().flatten(1)).reshape(base.shape)
    assert torch.allclose(found, base.double() + product * 0.5, rtol=1e-14, atol=1e-14)


def test_dora_scales_rows_to_the_magnitude() -> None:
    op, base, a, b, arrays = merge("F32", 8, dora=True)
    found = torch.from_numpy(stream(op, base, "F32", arrays=arrays))
    plain = base.double() + (b.double() @ a.double()) * 2
    wanted = plain / plain.norm(dim=1, keepdim=True) * torch.from_numpy(arrays["m"]).double()[:, None]
    assert torch.allclose(found, wanted, rtol=1e-13, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    op, base, _, _, arrays = merge("F32", 8)
    base[3, 4], base[5, 6] = float("nan"), float("inf")
    found = stream(op, base, "F32", arrays=arrays)
    assert np.argwhere(~np.isfinite(found)).tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_merge_in_float32_is_within_its_margin(dtype: str, dora: bool) -> None:
    """In two orders of the sums; and the margin is no more than some hundred units of float32, of the row's largest."""
    op, base, a, b, arrays = merge(dtype, 64, columns=600, dora=dora)
    exact, least, most = (stream(replace(op, margin=m), base, dtype, arrays=arrays) for m in (0, -1, 1))
    for order in (torch.arange(64), torch.arange(64).flip(0)):
        theirs = base.float() + (b[:, order] @ a[order]) * (16 / 64)
        if dora:
            theirs = theirs * (torch.from_numpy(arrays["m"])[:, None] / theirs.norm(dim=1, keepdim=True))
        assert (theirs.numpy() != exact).mean() > 0.9
        assert (least <= theirs.numpy()).all() and (theirs.numpy() <= most).all()
    assert np.allclose((least + most) / 2, exact, rtol=0, atol=1e-13)
    assert 0 < (most - least).max() < (1500 if dora else 500) * 2.0**-24 * np.abs(exact).max()


# --- rows


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cuts", [(), (1,), (3, 7, 50)])
def test_padded_rows_are_the_exact_mean(dtype: str, cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    old = (torch.randn(100, 6, generator=generator, dtype=torch.float64) * 1e3).to(TORCH[dtype])
    found = to_tensor(stream(PadRows(128), old, dtype, cuts=cuts), dtype)
    assert same_bits(found[:100], old)
    assert same_bits(found[100:], found[100:101].expand(28, 6).contiguous())
    mean = old.double().mean(dim=0)
    if dtype == "F64":  # the order of the sums shows here, and here alone
        assert torch.allclose(found[100], mean, rtol=1e-14)
    else:
        wanted = to_tensor(stream(Cast(dtype), mean.reshape(1, -1), "F64"), dtype)
        assert same_bits(found[100:101], wanted)


def test_mean_of_large_values_does_not_overflow() -> None:
    old = torch.full((10, 2), 60000.0, dtype=torch.float16)
    found = stream(PadRows(12), old, "F16")
    assert found[10:].tolist() == [[60000.0] * 2] * 2


def test_padding_undone() -> None:
    old = torch.randn(10, 3).to(torch.bfloat16)
    op = PadRows(64)
    inverse = op.inverse("BF16", (10, 3))
    assert inverse == TakeRows(10)
    there = to_tensor(stream(op, old, "BF16"), "BF16")
    assert there.shape == (64, 3)
    for cuts in ((), (4,), (10, 20), (9, 11)):
        assert same_bits(to_tensor(stream(TakeRows(10), there, "BF16", cuts=cuts), "BF16"), old)


def test_take_rows_of_integers_too() -> None:
    """Rows are only left out: a dtype that nothing can be computed on is no obstacle."""
    assert TakeRows(3).result("I8", (5, 2)) == ("I8", (3, 2))
    assert TakeRows(3).inverse("F16", (5, 2)) is None


@pytest.mark.parametrize("op", [PadRows(8), TakeRows(2), LORA_OP], ids=lambda op: op.name)
def test_rows_of_blocks_are_left_alone(op: Op) -> None:
    with pytest.raises(UnsupportedError, match="Q8_0"):
        op.result("Q8_0", (4, 32))


# --- rotary order


def by_hand(values: Any, heads: int) -> Any:
    """ggml's row 2i + j of a head is transformers' row j * half + i."""
    size = len(values) // heads
    order = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return values[order]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "cuts"), [(1, ()), (4, (6, 18)), (2, (12,)), (12, (2, 4, 6, 22))])
def test_rope_order(dtype: str, heads: int, cuts: tuple[int, ...]) -> None:
    tensor = random_bits(dtype, 24 * 5).reshape(24, 5)
    op = RopePermute(heads)
    assert op.result(dtype, (24, 5)) == (dtype, (24, 5)) and op.rows_together((24, 5)) == 24 // heads
    found = stream(op, tensor, dtype, cuts=cuts)
    assert found.tobytes() == by_hand(to_array(tensor), heads).tobytes()
    back = op.inverse(dtype, (24, 5))
    assert back == RopePermute(heads, back=True) and back.inverse(dtype, (24, 5)) == op
    assert stream(back, to_tensor(found, dtype), dtype, cuts=cuts).tobytes() == to_array(tensor).tobytes()


def test_rope_order_of_a_bias_and_of_blocks() -> None:
    bias = torch.arange(12.0)
    assert stream(RopePermute(2), bias, "F32").tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    values = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)
    made = quants.quantize(values, GGMLQuantizationType.Q8_0)
    (found,) = RopePermute(2).stream(iter([made]), "Q8_0", (12, 64), Context(lambda _: None, CastLoss()))
    assert found.tobytes() == quants.quantize(by_hand(values, 2), GGMLQuantizationType.Q8_0).tobytes()


def test_rope_scores_are_the_same() -> None:
    """What it is for: turned as ggml's llama turns them, permuted rows give transformers' attention scores."""
    heads, size, columns, position = 2, 8, 6, 5
    generator = np.random.default_rng(0)
    query, key = generator.standard_normal((2, heads * size, columns))
    x, y = generator.standard_normal((2, columns))
    angle = position * 10000.0 ** (-np.arange(size // 2) / (size // 2))

    def halves(v: Any) -> Any:  # transformers: row i with row i + half
        v = v.reshape(heads, 2, -1)
        a, b = v[:, 0], v[:, 1]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    def pairs(v: Any) -> Any:  # ggml: row 2i with row 2i + 1
        v = v.reshape(heads, -1, 2)
        a, b = v[..., 0], v[..., 1]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    context = Context(lambda _: None, CastLoss())
    permuted = [next(RopePermute(heads).stream(iter([w]), "F64", w.shape, context)) for w in (query, key)]
    wanted = (halves(query @ x) * (key @ y).reshape(heads, -1)).sum(1)
    found = (pairs(permuted[0] @ x) * (permuted[1] @ y).reshape(heads, -1, 2)).sum((1, 2))
    assert np.allclose(found, wanted, rtol=1e-12)


def test_heads_that_do_not_fit() -> None:
    for shape, heads in (((24, 5), 5), ((24, 5), 24), ((), 2), ((24, 5), 0)):
        with pytest.raises(UnsupportedError, match=r"cannot reorder shape .* are not \d+ heads"):
            RopePermute(heads).result("F16", shape)
    for dtype, shape in (("I64", (24, 5)), ("Q8_0", (64,))):
        with pytest.raises(UnsupportedError, match=dtype):
            RopePermute(2).result(dtype, shape)


# --- quantised


def quantised(op: Op, values: Any, dtype: str, *, cuts: Sequence[int] = ()) -> tuple[Any, CastLoss]:
    loss = CastLoss()
    ends = [0, *cuts, len(values)]
    blocks = iter([values[a:b] for a, b in pairwise(ends)])
    made = list(op.stream(blocks, dtype, values.shape, Context(lambda _: None, loss, name="blk.0.w")))
    return np.concatenate(made), loss


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("to", ["Q8_0", "Q5_1"])
def test_quantize_against_gguf_py(dtype: str, to: str) -> None:
    """Rows longer than what is widened at a time, and shorter; the values are those of the source, widened."""
    for shape in ((70, 2048), (2, 131072)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(TORCH[dtype])
        found, loss = quantised(Quantize(to), to_array(tensor), dtype, cuts=(1,))
        assert found.tobytes() == quants.quantize(tensor.float().numpy(), GGMLQuantizationType[to]).tobytes()
        assert (loss.overflowed, loss.nonfinite) == (0, 0)
        assert Quantize(to).result(dtype, shape) == (to, shape)


@pytest.mark.parametrize("to", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_quantize_does_not_mind_the_cuts(to: str) -> None:
    values = np.random.default_rng(0).standard_normal((90, 1024)).astype(np.float32)
    whole, _ = quantised(Quantize(to), values, "F32")
    for cuts in ((1,), (3, 7, 64), tuple(range(10, 90, 10))):
        assert quantised(Quantize(to), values, "F32", cuts=cuts)[0].tobytes() == whole.tobytes()


def test_scales_that_overflow_are_counted() -> None:
    """A block's scale is a float16: 1e9 / 127 is none. The blocks beside it are as they were."""
    values = np.ones((4, 64), np.float32)
    values[2, 40] = 1e9
    found, loss = quantised(Quantize("Q8_0"), values, "F32")
    assert loss.overflowed == 32
    values[2, 40] = 8e6  # larger than any float16, and its scale is not
    _, loss = quantised(Quantize("Q8_0"), values, "F32")
    assert loss.overflowed == 0
    assert found[3].tobytes() == quants.quantize(values[3:], GGMLQuantizationType.Q8_0).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_is_quantised(bad: float) -> None:
    values = np.ones((4, 64), np.float32)
    values[3, 63] = bad
    with pytest.raises(InputError, match=r"blk\.0\.w: 1 of 256 values .* NaN or infinite, and Q4_0"):
        quantised(Quantize("Q4_0"), values, "F32")


def test_what_cannot_be_quantised() -> None:
    cases = [
        (Quantize("Q4_K"), "F16", (4, 128), "rows of 128 weights to Q4_K: its blocks hold 256"),
        (Quantize("Q8_0"), "F16", (4, 3, 14, 14), "rows of 14 weights"),
        (Quantize("Q8_0"), "F32", (64,), "only matrices"),
        (Quantize("Q8_0"), "Q4_0", (4, 64), "cannot quantise Q4_0"),
        (Quantize("Q8_0"), "I64", (4, 64), "cannot quantise I64"),
        (Dequantize(), "F16", (4, 64), "not a block type"),
        (Dequantize(), "Q8_0", (64,), "only matrices"),
        (Dequantize(), "Q8_K", (4, 256), "gguf-py does not know"),
    ]
    for op, dtype, shape, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            op.result(dtype, shape)


@pytest.mark.parametrize("dtype", ["Q4_0", "Q8_0", "Q2_K", "Q6_K", "IQ2_XS", "MXFP4"])
def test_dequantize_against_gguf_py(dtype: str) -> None:
    weights, size = QUANTS[dtype]
    blocks = np.random.default_rng(0).integers(0, 60, (6, 2 * size), np.uint8)
    assert as_array(blocks.tobytes(), dtype, 2 * weights).tobytes() == blocks.tobytes()
    assert Dequantize().result(dtype, (6, 2 * weights)) == ("F32", (6, 2 * weights))
    found, _ = quantised(Dequantize(), blocks, dtype, cuts=(1, 4))
    assert found.dtype == np.float32 and found.shape == (6, 2 * weights)
    assert np.array_equal(found, quants.dequantize(blocks, GGMLQuantizationType[dtype]))


def test_steps_between_dtypes() -> None:
    wanted = {
        ("F16", "F16"): (),
        ("Q8_0", "Q8_0"): (),
        ("BF16", "F32"): (Cast("F32"),),
        ("BF16", "Q4_K"): (Quantize("Q4_K"),),
        ("F64", "Q4_K"): (Cast("F32"), Quantize("Q4_K")),
        ("Q6_K", "F32"): (Dequantize(),),
        ("Q6_K", "BF16"): (Dequantize(), Cast("BF16")),
    }
    assert {pair: steps(*pair) for pair in wanted} == wanted
    (op,) = steps("Q4_0", "Q8_0")
    with pytest.raises(UnsupportedError, match="cannot quantise Q4_0 to Q8_0"):
        op.result("Q4_0", (4, 64))


# --- constants


def test_constants() -> None:
    context = Context(lambda _: None, CastLoss())
    source, (op,) = constant("rope_freqs.weight", (4,), [1, 2, 0.1, 8])
    assert (source.shape, source.extents, source.nbytes) == ((0,), (), 0)
    (found,) = op.stream(iter([]), "F32", (0,), context)
    assert found.dtype == np.float32 and found.tolist() == [[1], [2], [np.float32(0.1)], [8]]
    (found,) = Constant((2, 3), (0.5,)).stream(iter([]), "F32", (0,), context)
    assert found.tolist() == [[0.5] * 3] * 2 and found.flags.c_contiguous
    assert op.result("F32", (0,)) == ("F32", (4,)) and op.inverse("F32", (0,)) is None
    for values in ((), (1.0, 2.0)):
        with pytest.raises(ValueError, match="values for shape"):
            Constant((3,), values)


# --- recipes


def test_an_op_and_its_inverse_go() -> None:
    start = Recipe(stored("w", "BF16", (8, 64)))
    permuted = start.then(RopePermute(2, back=True))
    assert permuted.then(RopePermute(2)) == start
    assert permuted.then(RopePermute(4)).ops == (RopePermute(2, back=True), RopePermute(4))
    assert start.then(Cast("F32"), Cast("BF16")) == start
    assert start.then(Cast("F16"), Cast("BF16")).ops == (Cast("F16"), Cast("BF16")), "that cast lost something"
    assert start.then(PadRows(64), TakeRows(8)) == start
    assert start.then(PadRows(64), TakeRows(9)).ops == (PadRows(64), TakeRows(9))
    assert start.then(PadRows(64), RopePermute(2), RopePermute(2, back=True), TakeRows(8)) == start
    merged = start.then(RopePermute(2), LORA_OP, RopePermute(2, back=True))
    assert merged.ops == (RopePermute(2), LORA_OP, RopePermute(2, back=True))
    quantised = Recipe(stored("w", "Q8_0", (8, 64))).then(Dequantize(), Quantize("Q8_0"))
    assert quantised.ops == (Dequantize(), Quantize("Q8_0"))


# --- all of them


def ops_of(rows: int, columns: int) -> list[Op]:
    a, b = stored("a", "F32", (2, columns)), stored("b", "F32", (rows, 2))
    return [
        Cast("BF16"),
        MergeLora(a, b, 2.0),
        PadRows(rows + 3),
        TakeRows(rows - 1),
        RopePermute(rows // 2, back=True),
        Join(2, (rows // 2, 1), (Chain(stored("other", "F32", (2, columns)), (Cast("BF16"),)),)),
        Part(2, 1, rows // 2 - 1, rows // 2),
        Quantize("Q8_0"),
        Dequantize(),
        DequantizeFp8(stored("s", "F32", (rows, 1))),
        Plus(1.0),
        Constant((rows, columns), (1.0,)),
        SetRows((0, rows - 1), stored("a", "F32", (2, columns))),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_result_tells_what_stream_makes(dtype: str) -> None:
    tensor = torch.randn(6, 4).to(TORCH[dtype])
    arrays = {"a": np.ones((2, 4), np.float32), "b": np.ones((6, 2), np.float32)}
    for op in ops_of(6, 4):
        if not isinstance(
            op, Quantize | Dequantize | DequantizeFp8 | Join
        ):  # those are tested on bytes, of a join where they are written
            stream(op, tensor, dtype, cuts=(2,), arrays=arrays)  # asserts dtype and shape


def test_the_set_is_closed_and_described() -> None:
    assert [type(op) for op in ops_of(6, 4)] == list(OPS)
    for op in ops_of(6, 4):
        described = op.describe()
        assert described["op"] == op.name
        assert json.loads(json.dumps(described)) == described
    assert MergeLora(stored("a", "F32", (2, 4)), stored("b", "F32", (6, 2)), 2.0).inputs()[1].name == "b"
    assert [op.rows_together((6, 4)) for op in ops_of(6, 4)] == [1, 1, 0, 0, 2, 0, 0, 1, 1, 1, 1, 0, 0]


def test_plus_is_of_float32_whatever_the_weights_are() -> None:
    """Norms of Gemma: a bfloat16 with one added is no bfloat16."""
    weights = torch.tensor([[2.0**-9], [-0.5], [3.0]])
    context = Context(lambda _: np.zeros(0), CastLoss())
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        rows = to_array(weights.to(kind))
        (found,) = Plus(1.0).stream(iter([rows]), dtype, (3, 1), context)
        assert found.dtype == np.float32 and found.ravel().tolist() == [1 + 2.0**-9, 0.5, 4.0]
    assert Plus(1.0).inverse("F32", (3,)) == Plus(-1.0) and Plus(1.0).inverse("BF16", (3,)) is None
