"""How ggml finds the scale of a few weights, for `lanes`: a block of weights to a lane, sixteen blocks at a time.

ggml goes through one block after another, number by number, in an order of sums that no compiler may change. Here each
block has a lane of its own, in which that order is kept, so that the results are ggml's to the last bit. The names in
quotes are its functions in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
from operator import add

from llava_convert.core.later import numpy as np
from llava_convert.ops.lanes import Code, Value, Writer

_NOTHING = 1e-15  # GROUP_MAX_EPS: weights no larger are taken for zeros
# The values of the 16 codes of IQ4_NL and IQ4_XS, and what lies halfway between them.
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_BETWEEN = [(lower + upper) / 2 for lower, upper in pairwise(_LEVELS)]


def affine(block: int, levels: int, start: float, tries: int, *, absolute: bool) -> Writer:
    """`make_qkx2_quants`: weight ≈ scale × code + minimum, codes 0 to `levels`; to (scale, minus the minimum).

    Each try rounds with another scale, fits scale and minimum to the codes, and counts if it is the closest yet.
    `absolute`: the closest by absolute and not by squared differences, and weights count by their size alone.
    """
    f32 = np.float32
    trials = [float(f32(start) + f32(0.1) * f32(number) + f32(levels)) for number in range(tries + 1)]

    def write(code: Code) -> None:
        x = code.across(0, block)
        counts = [value.magnitude() for value in x]
        if not absolute:
            mean = (_sum(value * value for value in x) / block).root()
            counts = [mean + size for size in counts]
        lowest = highest = x[0]
        for value in x[1:]:
            lowest = (value < lowest).choose(value, lowest)
            highest = (value > highest).choose(value, highest)
        lowest = (lowest > 0).choose(0, lowest)
        counted, weighted = _sum(counts), _products(counts, x)

        def distance(scale: Value, minimum: Value, codes: Sequence[Value]) -> Value:
            off = [scale * chosen + minimum - value for chosen, value in zip(codes, x, strict=True)]
            return _products(counts, [one.magnitude() if absolute else one * one for one in off])

        inverse = levels / (highest - lowest)
        codes = [(inverse * (value - lowest)).nearest(0, levels) for value in x]
        scale, minimum = code.variable(1 / inverse), code.variable(lowest)
        best = code.variable(distance(scale.get(), lowest, codes))
        with code.each(trials) as trial:
            inverse = trial / (highest - minimum.get())
            codes = [(inverse * (value - minimum.get())).nearest(0, levels) for value in x]
            once = [count * chosen for count, chosen in zip(counts, codes, strict=True)]
            first, second, mixed = _sum(once), _products(once, codes), _products(once, x)
            determinant = counted * second - first * first
            new_scale = (counted * mixed - weighted * first) / determinant
            new_minimum = (second * weighted - first * mixed) / determinant
            above = new_minimum > 0
            new_scale, new_minimum = above.choose(mixed / second, new_scale), above.choose(0, new_minimum)
            new = distance(new_scale, new_minimum, codes)
            better = (determinant > 0) & (new < best.get())
            for variable, found in ((best, new), (scale, new_scale), (minimum, new_minimum)):
                variable.set(better.choose(found, variable.get()))
        flat = highest.equals(lowest)
        code.put(1, flat.choose(0, scale.get()))
        code.put(2, 0 - flat.choose(lowest, minimum.get()))

    return write


def symmetric(code: Code) -> None:
    """`make_qx_quants` of 16 weights: weight ≈ scale × code, codes -32 to 31; to the scale."""
    x, f32 = code.across(0, 16), np.float32
    size, largest = _largest(x)
    squares = [value * value for value in x]
    cubes = [square * value for square, value in zip(squares, x, strict=True)]

    def sums(inverse: Value) -> tuple[Value, Value]:
        codes = [(inverse * value).nearest(-32, 31) for value in x]
        once = [square * chosen for square, chosen in zip(squares, codes, strict=True)]
        return _products(cubes, codes), _products(once, codes)

    mixed, second = sums(-32 / largest)
    scale = second.equals(0).choose(0, mixed / second)
    trials = [-float(f32(32) + f32(0.1) * f32(number)) for number in range(-9, 10) if number]
    code.put(1, (size < _NOTHING).choose(0, _best(code, scale, mixed, trials, lambda trial: sums(trial / largest))))


def nonlinear(code: Code) -> None:
    """`quantize_row_iq4_nl_impl` of 32 weights: weight ≈ scale × the value of its code; to the scale."""
    x = code.across(0, 32)
    size, largest = _largest(x)
    squares = [value * value for value in x]

    def sums(inverse: Value) -> tuple[Value, Value]:
        values = [_level(inverse * value, _LEVELS) for value in x]
        once = [square * value for square, value in zip(squares, values, strict=True)]
        return _products(once, x), _products(once, values)

    mixed, second = sums(1 / ((0 - largest) / _LEVELS[0]))
    scale = (second > 0).choose(mixed / second, 0)
    trials = [number + _LEVELS[0] for number in range(-7, 8)]
    code.put(1, (size < _NOTHING).choose(0, _best(code, scale, mixed, trials, lambda trial: sums(trial / largest))))


def eight_bits(code: Code) -> None:
    """`quantize_row_q8_0_ref` of 32 weights: weight ≈ scale × code, codes -127 to 127; to the scale."""
    code.put(1, _largest(code.across(0, 32))[0] / 127)


# --- from the scales to the codes of the weights, as bytes; a block to a group


def by_division(block: int, least: int, most: int) -> Writer:
    """The nearest to (weight + minus the minimum) / scale, less `least`."""

    def write(code: Code) -> None:
        scale, minimum = code.one(1), code.one(2)
        exact = [(value + minimum) / scale for value in code.along(0, block)]
        code.put_bytes(3, [value.nearest(least, most) - least for value in exact])

    return write


def by_product(code: Code) -> None:
    """Of 32 weights: weight × inverse, halves away from zero; a negative code is that of its two's complement."""
    code.put_bytes(2, [(value * code.one(1)).rounded() for value in code.along(0, 32)])


def by_level(code: Code) -> None:
    """Of 32 weights: the code whose value is nearest to weight × inverse."""
    code.put_bytes(2, [_level(value * code.one(1), range(len(_LEVELS))) for value in code.along(0, 32)])


def _best(
    code: Code, scale: Value, mixed: Value, trials: Sequence[float], sums: Callable[[Value], tuple[Value, Value]]
) -> Value:
    """The scale of the trial whose codes leave the least error, `scale` if none leaves less."""
    kept, best = code.variable(scale), code.variable(scale * mixed)
    with code.each(trials) as trial:
        mixed, second = sums(trial)
        better = (second > 0) & (mixed * mixed > best.get() * second)
        kept.set(better.choose(mixed / second, kept.get()))
        best.set(better.choose(kept.get() * mixed, best.get()))
    return kept.get()


def _largest(x: Sequence[Value]) -> tuple[Value, Value]:
    """The largest magnitude, and the first of the values that have it."""
    size = value = x[0].code.number(0)
    for one in x:
        larger = one.magnitude() > size
        size, value = larger.choose(one.magnitude(), size), larger.choose(one, value)
    return size, value


def _level(exact: Value, results: Sequence[float]) -> Value:
    """`best_index_int8`: of 16 results, the one of the level that is nearest to `exact`; halfway, the upper one."""
    found = exact.code.number(results[0])
    for bound, result in zip(_BETWEEN, results[1:], strict=True):
        found = (exact < bound).choose(found, result)
    return found


def _products(ones: Sequence[Value], others: Sequence[Value]) -> Value:
    return _sum(one * other for one, other in zip(ones, others, strict=True))


def _sum(values: Iterable[Value]) -> Value:
    """One after the other."""
    return reduce(add, values)
