"""Stored bytes as NumPy arrays: which type holds which dtype.

NumPy has no bfloat16, so a BF16 array is its bits as uint16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS, nbytes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:
    Array = object  # where NumPy is not imported yet

# How each dtype's elements are held in NumPy.
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

FLOATS = frozenset(NUMPY_TYPES)

# Floats of 8 bits, held as their codes: no arithmetic is done on them but that which makes wider ones of them.
FP8 = ("F8_E4M3", "F8_E5M2")


def raw(values: Array) -> memoryview:
    """A contiguous array's bytes, without a copy."""
    return memoryview(values.reshape(-1).view(np.uint8).data)


def as_array(raw: bytes | bytearray | memoryview, dtype: str, columns: int) -> Array:
    """Raw bytes as a block of rows."""
    if dtype in QUANTS:
        return cast(Array, np.frombuffer(raw, np.uint8).reshape(-1, nbytes_of(dtype, columns)))
    if dtype in FP8:
        return cast(Array, np.frombuffer(raw, np.uint8).reshape(-1, columns))
    if dtype not in NUMPY_TYPES:
        raise UnsupportedError(f"no arithmetic is done on {dtype}")
    return cast(Array, np.frombuffer(raw, NUMPY_TYPES[dtype]).reshape(-1, columns))
