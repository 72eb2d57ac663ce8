"""Ops: what each says will come out comes out, in the bits that torch gives, however the rows are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_convert.errors import UnsupportedError
from llava_convert.numerics import NUMPY_TYPES, CastLoss
from llava_convert.ops import OPS, Cast, Context, MergeLora, Op, PadRows, TakeRows, as_array
from llava_convert.spec import DTYPE_BITS, TORCH_NAMES, Extent, StoredTensor

FLOATS = ("F16", "BF16", "F32", "F64")
TORCH = {dtype: getattr(torch, TORCH_NAMES[dtype]) for dtype in FLOATS}
Arrays = dict[str, Any]


def stored(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    length = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
    return StoredTensor(name, dtype, shape, (Extent(Path("x"), 0, length),))


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
    size = DTYPE_BITS[dtype] // 8
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
def test_merge_against_the_formula(dtype: str, rank: int) -> None:
    op, base, a, b, arrays = merge(dtype, rank)
    found = torch.from_numpy(stream(op, base, dtype, arrays=arrays))
    assert same_bits(found, base.float() + (b @ a) * (16 / rank))
    assert not torch.equal(found, base.float())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_row_blocks_give_the_bits_of_the_whole(rank: int, dora: bool) -> None:
    op, base, _, _, arrays = merge("F32", rank, rows=640, columns=512, dora=dora)
    whole = stream(op, base, "F32", arrays=arrays)
    for cuts in ((64, 128, 192, 256, 320, 384, 448, 512, 576), (128, 512), (320,)):
        assert stream(op, base, "F32", cuts=cuts, arrays=arrays).tobytes() == whole.tobytes()


def test_merge_starts_at_any_row() -> None:
    """Rows are shared out to threads: a task that starts in the middle takes the rows of B from there."""
    op, base, a, b, arrays = merge("F32", 8)
    context = Context(lambda wanted: arrays[wanted.name], CastLoss(), first_row=64)
    (found,) = op.stream(iter([to_array(base)[64:192]]), "F32", (200, 48), context)
    assert same_bits(torch.from_numpy(found), (base + (b @ a) * 2)[64:192])


def test_merge_of_half_precision_adapters() -> None:
    op, base, a, b, arrays = merge("F32", 8)
    halves = {"a": to_array(a.bfloat16()), "b": to_array(b.half())}
    op = MergeLora(stored("a", "BF16", (8, 48)), stored("b", "F16", (200, 8)), 2.0)
    found = torch.from_numpy(stream(op, base, "F32", arrays=halves))
    assert same_bits(found, base + (b.half().float() @ a.bfloat16().float()) * 2)
    assert set(arrays) == set(halves)


def test_merge_into_a_convolution() -> None:
    """A patch embedding's LoRA is a small convolution and one of a single pixel: flattened it is the same product."""
    generator = torch.Generator().manual_seed(0)
    base, a = torch.randn(32, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    b = torch.randn(32, 2, 1, 1, generator=generator)
    op = MergeLora(stored("a", "F32", (2, 3, 4, 4)), stored("b", "F32", (32, 2, 1, 1)), 0.5)
    found = torch.from_numpy(stream(op, base, "F32", arrays={"a": to_array(a), "b": to_array(b)}))
    wanted = base + (b.flatten(1) @ a.flatten(1)).reshape(base.shape) * 0.5
    assert same_bits(found, wanted)


def test_dora_scales_rows_to_the_magnitude() -> None:
    op, base, _, _, arrays = merge("F32", 8, dora=True)
    found = torch.from_numpy(stream(op, base, "F32", arrays=arrays))
    assert torch.allclose(found.norm(dim=1), torch.from_numpy(arrays["m"]), rtol=1e-6)


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


# --- all of them


def ops_of(rows: int, columns: int) -> list[Op]:
    a, b = stored("a", "F32", (2, columns)), stored("b", "F32", (rows, 2))
    return [Cast("BF16"), MergeLora(a, b, 2.0), PadRows(rows + 3), TakeRows(rows - 1)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_result_tells_what_stream_makes(dtype: str) -> None:
    tensor = torch.randn(6, 4).to(TORCH[dtype])
    arrays = {"a": np.ones((2, 4), np.float32), "b": np.ones((6, 2), np.float32)}
    for op in ops_of(6, 4):
        stream(op, tensor, dtype, cuts=(2,), arrays=arrays)  # asserts dtype and shape


def test_the_set_is_closed_and_described() -> None:
    assert [type(op) for op in ops_of(6, 4)] == list(OPS)
    for op in ops_of(6, 4):
        described = op.describe()
        assert described["op"] == op.name
        assert json.loads(json.dumps(described)) == described
    assert MergeLora(stored("a", "F32", (2, 4)), stored("b", "F32", (6, 2)), 2.0).inputs()[1].name == "b"
    assert [op.row_local for op in ops_of(6, 4)] == [True, True, False, False]
