"""ggml's blocks made sixteen at a time: the bytes of its `quantize_row_*_ref`, up to sixty times as fast.

The blocks of most types are super-blocks: 256 weights in sub-blocks of 16 or 32, whose scales are multiples of one
number. `searches` finds the scales, NumPy makes them multiples, `searches` again the codes of the weights, and NumPy
packs all that. Of a sub-block whose scale becomes zero ggml keeps the codes that its search met last: those few
super-blocks are made by ggml itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS
from llava_convert.core.values import dataclass
from llava_convert.ops import lanes
from llava_convert.ops import searches as by

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_convert.ops.kernels import Make

    Floats = NDArray[np.float32]
    Bytes = NDArray[Any]  # of uint8


class _Scales(NamedTuple):
    """Of n blocks with s sub-blocks each."""

    numbers: tuple[NDArray[np.float16], ...]  # that the file holds, (n, 1)
    multiples: tuple[Floats, ...]  # whole numbers that it holds, (n, s)
    steps: tuple[Floats, ...]  # what the codes are made with, (n, s)


# --- from what a search found to what a block holds


def _affine(top: int) -> Callable[..., _Scales]:
    """Scales and minima as multiples, 0 to `top`, of a number each."""

    def part(values: Floats) -> tuple[NDArray[np.float16], Floats]:
        largest = values.max(axis=1, keepdims=True, initial=0)
        inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
        return _half(largest / np.float32(top)), np.minimum(np.rint(inverse * values), np.float32(top))

    def scales(scales: Floats, minima: Floats) -> _Scales:
        (d, scales), (dmin, minima) = part(scales), part(minima)
        return _Scales((d, dmin), (scales, minima), (_single(d) * scales, _single(dmin) * minima))

    return scales


def _symmetric(scales: Floats) -> _Scales:
    """Scales as multiples, -128 to 127, such that the largest is -128."""
    inverse = np.float32(-128) / _largest(scales)
    d, multiples = _half(np.float32(1) / inverse), np.minimum(np.rint(inverse * scales), np.float32(127))
    steps = _single(d) * multiples
    return _Scales((d,), (multiples,), (steps, np.zeros_like(steps)))


def _nonlinear(scales: Floats) -> _Scales:
    """The same for IQ4_XS, whose codes are made with the number before it is rounded."""
    d = -_largest(scales) / np.float32(32)
    multiples = np.clip(np.rint(_inverse(d) * scales), np.float32(-32), np.float32(31))
    return _Scales((_half(d),), (multiples,), (_inverse(d * multiples),))


def _alone(scales: Floats) -> _Scales:
    """Of blocks that are no super-blocks."""
    return _Scales((_half(scales),), (), (_inverse(scales),))


def _largest(scales: Floats) -> Floats:
    """The first of the largest magnitude, of each row; never -0."""
    return np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1) + np.float32(0)


def _inverse(values: Floats) -> Floats:
    return np.where(values == 0, np.float32(0), np.float32(1) / values)


def _half(values: Floats) -> NDArray[np.float16]:
    return values.astype(np.float16)


def _single(values: NDArray[np.float16]) -> Floats:
    return values.astype(np.float32)


# --- the bytes of a block: the structs of ggml-common.h


def _q2_k(found: _Scales, codes: Bytes) -> list[Bytes]:
    scales, minima = map(_bytes, found.multiples)
    return [scales | minima << 4, _quarters(codes), *map(_bytes_of, found.numbers)]


def _q4_k(found: _Scales, codes: Bytes) -> list[Bytes]:
    return [*_six_bits(found), _halves(codes, 32)]


def _q5_k(found: _Scales, codes: Bytes) -> list[Bytes]:
    return [*_six_bits(found), _eighths(codes >> 4), _halves(codes & 15, 32)]


def _q6_k(found: _Scales, codes: Bytes) -> list[Bytes]:
    scales = found.multiples[0].astype(np.int8).view(np.uint8)
    return [_halves(codes & 15, 64), _quarters(codes >> 4), scales, _bytes_of(found.numbers[0])]


def _q8_0(found: _Scales, codes: Bytes) -> list[Bytes]:
    return [_bytes_of(found.numbers[0]), codes]


def _iq4_nl(found: _Scales, codes: Bytes) -> list[Bytes]:
    return [_bytes_of(found.numbers[0]), _halves(codes, 16)]


def _iq4_xs(found: _Scales, codes: Bytes) -> list[Bytes]:
    scales = _bytes(found.multiples[0] + np.float32(32))
    low = scales[:, ::2] & 15 | scales[:, 1::2] << 4
    high = scales.reshape(-1, 2, 4) >> 4 << (0, 2, 4, 6)
    return [_bytes_of(found.numbers[0]), np.bitwise_or.reduce(high, axis=2), low, _halves(codes, 16)]


def _six_bits(found: _Scales) -> list[Bytes]:
    """Both numbers, then eight scales and eight minima of 6 bits each, in 12 bytes."""
    (s, s_last), (m, m_last) = (np.split(_bytes(six), 2, axis=1) for six in found.multiples)
    packed = (s | s_last >> 4 << 6, m | m_last >> 4 << 6, s_last & 15 | m_last << 4)
    return [*map(_bytes_of, found.numbers), *packed]


def _halves(codes: Bytes, run: int) -> Bytes:
    """Codes of 4 bits: each two runs of so many in one run of bytes."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    packed: Bytes = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return packed.reshape(len(codes), -1)


def _quarters(codes: Bytes) -> Bytes:
    """Codes of 2 bits: each four runs of 32 in one run of bytes."""
    fours = codes.reshape(-1, 2, 4, 32)
    packed: Bytes = fours[:, :, 0] | fours[:, :, 1] << 2 | fours[:, :, 2] << 4 | fours[:, :, 3] << 6
    return packed.reshape(-1, 64)


def _eighths(codes: Bytes) -> Bytes:
    """Codes of 1 bit: eight runs of 32 in one run of bytes."""
    return reduce(np.bitwise_or, (codes[:, 32 * bit : 32 * bit + 32] << bit for bit in range(8)))


def _bytes(whole: Floats) -> Bytes:
    return whole.astype(np.uint8)


def _bytes_of(number: NDArray[np.float16]) -> Bytes:
    return number.view(np.uint8)


# --- the types


@dataclass(frozen=True, slots=True)
class _Type:
    """How a search of `block` weights becomes blocks. `found` and `steps` are how many arrays go between."""

    block: int
    search: lanes.Writer
    found: int
    scales: Callable[..., _Scales]
    steps: int
    codes: lanes.Writer
    pack: Callable[[_Scales, Bytes], list[Bytes]]


def types() -> dict[str, _Type]:
    q2 = by.affine(16, 3, -0.5, 15, absolute=True)
    q4, q5 = by.affine(32, 15, -1, 20, absolute=False), by.affine(32, 31, -0.5, 15, absolute=False)
    return {
        "Q2_K": _Type(16, q2, 2, _affine(15), 2, by.by_division(16, 0, 3), _q2_k),
        "Q4_K": _Type(32, q4, 2, _affine(63), 2, by.by_division(32, 0, 15), _q4_k),
        "Q5_K": _Type(32, q5, 2, _affine(63), 2, by.by_division(32, 0, 31), _q5_k),
        "Q6_K": _Type(16, by.symmetric, 1, _symmetric, 2, by.by_division(16, -32, 31), _q6_k),
        "Q8_0": _Type(32, by.eight_bits, 1, _alone, 1, by.by_product, _q8_0),
        "IQ4_NL": _Type(32, by.nonlinear, 1, _alone, 1, by.by_level, _iq4_nl),
        "IQ4_XS": _Type(32, by.nonlinear, 1, _nonlinear, 1, by.by_level, _iq4_xs),
    }


def maker(dtype: str, ggml: Make) -> Make:
    """What makes rows of float32, (n, columns), into blocks of one of the types, (n, bytes of a row); both contiguous.

    `ggml` makes the few blocks that the lanes do not. Raises OSError as `lanes.compiled` does.
    """
    kind, (width, _) = types()[dtype], QUANTS[dtype]
    arrays = {"search": "f" + "f" * kind.found, "codes": "f" + "f" * kind.steps + "b"}
    compiled = lanes.compiled({"search": (kind.search, arrays["search"]), "codes": (kind.codes, arrays["codes"])})
    search, code = compiled["search"], compiled["codes"]
    divides = kind.steps == 2  # by a scale, which must not be zero

    def make(rows: Floats, out: Bytes) -> None:
        weights = rows.reshape(-1, width)
        blocks = out.reshape(len(weights), -1)
        shape = (len(weights), width // kind.block)
        # NaN stays where the last group of lanes would not be full.
        found = [np.full(shape, np.nan, np.float32) for _ in range(kind.found)]
        search(*_addresses(weights, *found), shape[0] * shape[1] // lanes.LANES)
        codes = np.empty(weights.shape, np.uint8)
        with np.errstate(all="ignore"):
            scales = kind.scales(*found)
            code(*_addresses(weights, *scales.steps, codes), shape[0] * shape[1])
            at = 0
            for part in kind.pack(scales, codes):
                blocks[:, at : at + part.shape[1]] = part
                at += part.shape[1]
            usual = np.logical_and.reduce([np.isfinite(step) for step in scales.steps])
            usual &= (scales.steps[0] != 0) if divides else True
        strange = ~usual.all(axis=1)
        if strange.any():
            again = np.empty((int(strange.sum()), blocks.shape[1]), np.uint8)
            ggml(weights[strange], again)
            blocks[strange] = again

    return make


def _addresses(*arrays: NDArray[Any]) -> list[int]:
    return [array.ctypes.data for array in arrays]
