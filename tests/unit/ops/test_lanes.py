"""The small compiler: each operation against NumPy's, and code that the system does not let run."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llava_convert.ops import lanes
from llava_convert.ops.lanes import Code, Value

RNG = np.random.default_rng(0)
ODD = [0.0, -0.0, 1e-45, -1e-40, 1e38, -3e38, np.inf, -np.inf, np.nan, 0.5, -0.5, 1.5, 2.5, -2.5, 4194303.5, 8388609.0]
LEFT = np.concatenate([np.repeat(ODD, 16), RNG.standard_normal(16 * 64)]).astype(np.float32)
RIGHT = np.concatenate([np.tile(ODD, 16), RNG.standard_normal(16 * 64)]).astype(np.float32)


def run(writer: Callable[[Code], None], arguments: str, *arrays: np.ndarray, groups: int) -> None:
    kernel = lanes.compiled({"kernel": (writer, arguments)})["kernel"]
    kernel(*(array.ctypes.data for array in arrays), groups)


def both(of: Callable[[Value, Value], Value]) -> np.ndarray:
    """The result for each pair of LEFT and RIGHT."""
    out = np.empty_like(LEFT)

    def write(code: Code) -> None:
        (left,), (right,) = code.along(0, 16), code.along(1, 16)
        code.put(2, of(left, right))

    run(write, "fff", LEFT, RIGHT, out, groups=len(LEFT) // 16)
    return out


OPERATIONS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "+": (lambda a, b: a + b, np.add),
    "-": (lambda a, b: a - b, np.subtract),
    "*": (lambda a, b: a * b, np.multiply),
    "/": (lambda a, b: a / b, np.divide),
    "1 -": (lambda a, b: 1 - a, lambda a, b: np.float32(1) - a),
    "1 /": (lambda a, b: 1 / a, lambda a, b: np.float32(1) / a),
    "a third": (lambda a, b: a * (1 / 3), lambda a, b: a * np.float32(1 / 3)),
    "two roundings": (lambda a, b: a * b + a, lambda a, b: a * b + a),
    "<": (lambda a, b: (a < b).choose(a, b), lambda a, b: np.where(a < b, a, b)),
    ">": (lambda a, b: (a > b).choose(1, 0), lambda a, b: np.where(a > b, np.float32(1), np.float32(0))),
    "==": (lambda a, b: a.equals(b).choose(1, 0), lambda a, b: np.where(a == b, np.float32(1), np.float32(0))),
    "and": (
        lambda a, b: ((a > b) & (a > 0)).choose(1, 0),
        lambda a, b: np.where((a > b) & (a > 0), np.float32(1), np.float32(0)),
    ),
    "magnitude": (lambda a, b: a.magnitude(), lambda a, b: np.abs(a)),
    "root": (lambda a, b: a.root(), lambda a, b: np.sqrt(a)),
    "halves away": (
        lambda a, b: a.rounded(),
        lambda a, b: np.copysign(np.floor(np.abs(a.astype(np.float64)) + 0.5), a),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_numpys_to_the_bit(name: str) -> None:
    ours, numpys = OPERATIONS[name]
    with np.errstate(all="ignore"):
        wanted = numpys(LEFT, RIGHT).astype(np.float32)
    made = both(ours)
    numbers = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(made), ~numbers)
    assert made[numbers].tobytes() == wanted[numbers].tobytes()


def test_nearest_is_rint_within_its_range_and_stays_within_its_bounds_beyond() -> None:
    made = both(lambda a, _: a.nearest(-4, 3))
    usual = np.abs(LEFT) < 4194303
    assert np.array_equal(made[usual], np.clip(np.rint(LEFT[usual]), -4, 3))
    assert set(made[~usual]) <= set(range(-4, 4))


def test_blocks_across_lanes_a_loop_and_bytes() -> None:
    x = RNG.standard_normal((5 * 16, 7)).astype(np.float32)
    sums, whole, codes = np.empty(80, np.float32), np.empty(80, np.float32), np.empty((80, 32), np.uint8)

    def across(code: Code) -> None:
        values = code.across(0, 7)
        total = values[0]
        for value in values[1:]:
            total = total + value
        code.put(1, total)
        kept = code.variable(code.number(0))
        with code.each([0.25, 0.5, 8]) as number:
            kept.set(kept.get() + number * values[6])
        code.put(2, kept.get())

    run(across, "fff", x, sums, whole, groups=5)
    wanted = x[:, 0].copy()
    for column in range(1, 7):
        wanted += x[:, column]
    assert sums.tobytes() == wanted.tobytes()
    last = x[:, 6]
    assert whole.tobytes() == (last * np.float32(0.25) + last * np.float32(0.5) + last * np.float32(8)).tobytes()

    def block(code: Code) -> None:
        code.put_bytes(2, [value + code.one(1) for value in code.along(0, 32)])

    numbers, offset = RNG.integers(-60, 60, (80, 32)).astype(np.float32), np.arange(80, dtype=np.float32) - 40
    run(block, "ffb", numbers, offset, codes, groups=80)
    assert np.array_equal(codes.view(np.int8), (numbers + offset[:, None]).astype(np.int8))


def test_where_made_code_may_not_run_that_is_an_error_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        lanes.compiled({})
