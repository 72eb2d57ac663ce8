"""Ops on random tensors: cut anywhere, they give what they give whole; inverses undo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llava_convert.core.arrays import NUMPY_TYPES
from llava_convert.core.tensors import Extent, StoredTensor
from llava_convert.ops.base import CastLoss, Context, Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Quantize
from llava_convert.ops.rows import PadRows, RopePermute, TakeRows

dtypes = st.sampled_from(sorted(NUMPY_TYPES))
cuts = st.lists(st.integers(0, 20), max_size=4).map(sorted)


@st.composite
def tensors(draw: st.DrawFn, dtype: str) -> Any:
    """Any bits at all, as rows of columns."""
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 5)))
    size = shape[0] * shape[1] * np.dtype(NUMPY_TYPES[dtype]).itemsize
    raw = draw(arrays.arrays(np.uint8, size))
    return raw.view(NUMPY_TYPES[dtype]).reshape(shape)


def blocks(values: Any, ends: Sequence[int]) -> Iterator[Any]:
    start = 0
    for end in (*ends, len(values)):
        if end > start:
            yield values[start:end]
            start = end


def run(op: Op, values: Any, dtype: str, ends: Sequence[int] = (), held: dict[str, Any] | None = None) -> Any:
    context = Context(lambda wanted: (held or {})[wanted.name], CastLoss())
    with np.errstate(all="ignore"):
        made = [np.array(block) for block in op.stream(blocks(values, ends), dtype, values.shape, context)]
    found = np.concatenate(made)
    out, shape = op.result(dtype, values.shape)
    assert (found.dtype, found.shape) == (NUMPY_TYPES[out], shape)
    return found


def finite(values: Any, dtype: str) -> Any:
    if dtype == "BF16":
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)


@given(st.data(), dtypes, dtypes, cuts)
def test_cast_does_not_mind_the_cuts(data: st.DataObject, dtype: str, to: str, ends: list[int]) -> None:
    values = data.draw(tensors(dtype))
    assert run(Cast(to), values, dtype, ends).tobytes() == run(Cast(to), values, dtype).tobytes()


@given(st.data(), st.sampled_from([("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")]))
def test_exact_casts_come_back(data: st.DataObject, pair: tuple[str, str]) -> None:
    dtype, to = pair
    values = data.draw(tensors(dtype))
    back = Cast(to).inverse(dtype, values.shape)
    assert back is not None
    again = run(back, run(Cast(to), values, dtype), to)
    kept = finite(values, dtype)
    assert again[kept].tobytes() == values[kept].tobytes()


@given(st.data(), dtypes, dtypes)
def test_casts_are_idempotent(data: st.DataObject, dtype: str, to: str) -> None:
    """What was rounded once does not move when it goes there again by way of where it came from."""
    values = data.draw(tensors(dtype))
    assume((dtype, to) not in {("F16", "BF16"), ("BF16", "F16")})
    once = run(Cast(to), values, dtype)
    again = run(Cast(to), run(Cast(dtype), once, to), dtype)
    kept = finite(once, to)
    assert again[kept].tobytes() == once[kept].tobytes()


@given(st.data(), dtypes, cuts, st.integers(0, 70), cuts)
def test_padding_is_undone(data: st.DataObject, dtype: str, ends: list[int], more: int, others: list[int]) -> None:
    values = data.draw(tensors(dtype))
    op = PadRows(len(values) + more)
    padded = run(op, values, dtype, ends)
    assert padded[: len(values)].tobytes() == values.tobytes()
    assert len({row.tobytes() for row in padded[len(values) :]}) <= 1
    back = op.inverse(dtype, values.shape)
    assert back is not None
    assert run(back, padded, dtype, others).tobytes() == values.tobytes()


@given(st.data(), dtypes, cuts)
def test_taken_rows_are_the_first(data: st.DataObject, dtype: str, ends: list[int]) -> None:
    values = data.draw(tensors(dtype))
    rows = data.draw(st.integers(1, len(values)))
    assert run(TakeRows(rows), values, dtype, ends).tobytes() == values[:rows].tobytes()


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, "F32", shape, (Extent(Path("x"), 0, 4 * shape[0] * shape[1]),))


small = st.integers(-8, 8)


@settings(deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), cuts)
def test_merge_is_the_formula(data: st.DataObject, rows: int, columns: int, rank: int, ends: list[int]) -> None:
    """On small whole numbers every sum is exact, so that any order of them and any cut must give the same."""
    base, a, b = (
        data.draw(arrays.arrays(np.float32, shape, elements=small))
        for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    op = MergeLora(stored("a", rank, columns), stored("b", rows, rank), 0.5)
    found = run(op, base, "F32", ends, {"a": a, "b": b})
    assert np.array_equal(found, base + b @ a * np.float32(0.5))


@given(st.data(), dtypes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_rope_order_is_undone(data: st.DataObject, dtype: str, heads: int, half: int, columns: int) -> None:
    """Against NumPy's formula on the whole, cut between any heads."""
    rows = 2 * heads * half
    raw = data.draw(arrays.arrays(np.uint8, rows * columns * np.dtype(NUMPY_TYPES[dtype]).itemsize))
    values = raw.view(NUMPY_TYPES[dtype]).reshape(rows, columns)
    ends = [2 * half * end for end in data.draw(st.lists(st.integers(0, heads), max_size=3).map(sorted))]
    there = run(RopePermute(heads), values, dtype, ends)
    assert there.tobytes() == values.reshape(heads, 2, half, columns).swapaxes(1, 2).tobytes()
    back = RopePermute(heads).inverse(dtype, values.shape)
    assert back is not None
    assert run(back, there, dtype, ends).tobytes() == values.tobytes()


def blocky(*, limit: float) -> st.SearchStrategy[Any]:
    """Rows of whole blocks of finite float32, exact zeros and subnormals among them."""
    shapes = st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96]))
    finite_values = st.floats(-limit, limit, width=32)
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=finite_values))


@settings(deadline=None)  # the first run loads the kernels
@given(blocky(limit=1e4), st.sampled_from(["Q8_0", "Q4_0"]), cuts)
def test_quantised_as_gguf_py_does(values: Any, dtype: str, ends: list[int]) -> None:
    context = Context(lambda _: None, CastLoss())
    made = list(Quantize(dtype).stream(blocks(values, ends), "F32", values.shape, context))
    with np.errstate(all="ignore"):
        wanted = quants.quantize(values + np.float32(0), GGMLQuantizationType[dtype])  # its -0 has a sign
    assert np.concatenate(made).tobytes() == wanted.tobytes()
    assert context.loss.overflowed == 0


@settings(deadline=None)  # the first run loads the kernels
@given(blocky(limit=6e4), st.sampled_from(["Q4_1", "Q5_0", "Q5_1", "Q8_0"]))
def test_each_weight_is_within_a_step(values: Any, dtype: str) -> None:
    """By gguf-py's reader: a block's range in as many steps as its bits allow, half a step each way, and float16."""
    context = Context(lambda _: None, CastLoss())
    (made,) = Quantize(dtype).stream(iter([values]), "F32", values.shape, context)
    again = quants.dequantize(made, GGMLQuantizationType[dtype]).reshape(-1, 32).astype(np.float64)
    wide = values.reshape(-1, 32).astype(np.float64)
    spans = np.ptp(wide, axis=1) if dtype in ("Q4_1", "Q5_1") else 2 * np.abs(wide).max(1)
    count = {"Q4_1": 15, "Q5_0": 32, "Q5_1": 31, "Q8_0": 254}[dtype]
    # Q5_0 has no step for the far end of its range, and scale and offset are rounded to float16.
    step = spans / count * (1 if dtype == "Q5_0" else 0.5)
    # Below 2^-14 a scale is rounded to steps of 2^-24, which up to 128 units make large.
    rounding = np.abs(wide).max(1) * 2.0**-9 + 2.0**-18
    assert (np.abs(again - wide).max(1) <= step + rounding).all()
