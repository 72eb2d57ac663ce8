"""The closed set of what a conversion may do to a tensor on its way.

A tensor with no op is moved byte by byte and never parsed. What an op is, `ops.base` says.
"""

from __future__ import annotations

from typing import Any

from llava_convert.core.tensors import QUANTS
from llava_convert.ops.base import Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.fp8 import DequantizeFp8
from llava_convert.ops.join import Join, Part
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Dequantize, Quantize
from llava_convert.ops.rows import Constant, PadRows, Plus, RopePermute, SetRows, TakeRows

OPS: tuple[type[Any], ...] = (
    Cast,
    MergeLora,
    PadRows,
    TakeRows,
    RopePermute,
    Join,
    Part,
    Quantize,
    Dequantize,
    DequantizeFp8,
    Plus,
    Constant,
    SetRows,
)
"""Every op there is, for `llava-convert layouts`. A byte-for-byte copy is the absence of ops."""


def steps(dtype: str, to: str) -> tuple[Op, ...]:
    """The ops from one dtype to another, quantised or not. What cannot be done, the ops' `result` refuses."""
    if dtype == to:
        return ()
    if to in QUANTS:
        return (Cast("F32"), Quantize(to)) if dtype == "F64" else (Quantize(to),)
    if dtype in QUANTS:
        return (Dequantize(),) if to == "F32" else (Dequantize(), Cast(to))
    return (Cast(to),)
