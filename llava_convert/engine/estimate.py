"""How long a plan may take: a guess by the kinds of arithmetic in it, right within a factor of two or three."""

from __future__ import annotations

from math import prod

from llava_convert.engine.plan import Plan
from llava_convert.ops import kernels
from llava_convert.ops.base import Op
from llava_convert.ops.join import every
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Quantize

# Weights in a second, of one thread, measured on a busy two-core machine by streaming 1024 × 14336 weights.
_OF_TYPE = {"IQ4_NL": 2e6, "IQ4_XS": 2e6, "Q6_K": 20e6, "Q3_K": 40e6, "Q2_K": 10e6, "Q4_K": 10e6, "Q5_K": 10e6}
_BY_LANES = 100e6  # the same types, vectorised
_QUANTIZE = 150e6  # the types that are not K-quants
_MERGE = 100e6
_OTHER = 300e6
_COPY = 400e6  # bytes in a second, read and written: an SSD; on a filesystem that shares blocks copies take no time


def seconds(plan: Plan, threads: int) -> float:
    """An estimate of the time that `execute` takes with so many threads, for files of this machine."""
    work = sum(
        prod(piece.shape) / _rate(op) for tensor in plan.tensors for piece in tensor.pieces for op in every(piece.ops)
    )
    return work / threads + plan.bytes_written / _COPY


def _rate(op: Op) -> float:
    if isinstance(op, Quantize):
        slow = _OF_TYPE.get(op.dtype)
        return _QUANTIZE if slow is None else _BY_LANES if kernels.vectorises(op.dtype) else slow
    return _MERGE if isinstance(op, MergeLora) else _OTHER
