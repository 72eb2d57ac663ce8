"""Floats as whole numbers: exact merges and correct rounding by Python's integers, with no float arithmetic at all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

# Of each type: bits of the significand (the hidden one too), the least exponent of a normal value, bits of the whole.
FORMATS = {"F16": (11, -14, 16), "BF16": (8, -126, 16), "F32": (24, -126, 32), "F64": (53, -1022, 64)}


def value_of(bits: int, dtype: str) -> Fraction:
    """The value of a finite bit pattern (IEEE 754, 3.4)."""
    significand, least, width = FORMATS[dtype]
    magnitude = bits & (1 << width - 1) - 1
    exponent, fraction = magnitude >> significand - 1, magnitude & (1 << significand - 1) - 1
    if exponent:
        fraction += 1 << significand - 1
    value = fraction * Fraction(2) ** (max(exponent, 1) - 1 + least - (significand - 1))
    return -value if bits >> width - 1 else value


def round_to(value: Fraction, dtype: str) -> int:
    """The bit pattern nearest to a value, ties to even; infinity from half a unit beyond the largest on. 0 is +0."""
    significand, least, width = FORMATS[dtype]
    sign = (1 << width - 1) if value < 0 else 0
    value = abs(value)
    if not value:
        return 0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()  # of the value, or one more
    exponent = max(least, exponent - (value < Fraction(2) ** exponent))
    units = value / Fraction(2) ** (exponent - (significand - 1))  # of the last place
    whole = units.numerator // units.denominator
    rest = units - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    # A carry out of the significand goes into the exponent, as it should; from the largest value, to infinity.
    found = whole + ((exponent - least) << significand - 1)
    infinity = (1 << width - 1) - (1 << significand - 1)
    return sign | min(found, infinity)


def merged(base: Any, a: Any, b: Any, scale: float) -> Any:
    """base + b·a·scale as an array of Fractions; the arrays are floats of two dimensions."""
    product = _over(b, _PLACES) @ _over(a, _PLACES)
    unit = Fraction(scale) / 2 ** (2 * _PLACES)
    return fractions(base) + np.vectorize(lambda whole: whole * unit, otypes=[object])(product)


def fractions(values: Any) -> Any:
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(np.asarray(values))


_PLACES = 149  # float32's last, of which each of its values is a whole number


def _over(values: Any, places: int) -> Any:
    """Values as whole numbers of 2^-places."""

    def whole(value: float) -> int:
        numerator, denominator = float(value).as_integer_ratio()
        assert 2**places % denominator == 0
        return numerator * (2**places // denominator)

    return np.vectorize(whole, otypes=[object])(np.asarray(values))
