"""The nouns at the bottom: where a tensor's bytes are, and what a dtype is called.

Dtypes are named as safetensors names them ("F32", "BF16", ...), in every module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from math import prod
from pathlib import Path

from llava_convert.core.errors import InputError
from llava_convert.core.values import dataclass

# Size of one element in bits; the names are safetensors 0.8's (F4 packs two in a byte).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# ggml's block types, as GGUF names them: weights in a block, and its bytes (`GGML_QUANT_SIZES` of gguf-py 0.19;
# of Q8_1, which no file holds, ggml itself has 36).
QUANTS: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18),
}  # fmt: skip

# What `--dtype` and config.json call the dtypes that a model can be cast to.
TORCH_NAMES: dict[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
FROM_TORCH_NAMES: dict[str, str] = {name: dtype for dtype, name in TORCH_NAMES.items()}


MAX_TENSORS = 200_000  # of a checkpoint: twice as many as the largest real model has (DeepSeek-V3: 92,000)


def require_few(where: str, count: int) -> None:
    """Raises InputError (exit 3) where a file, or the files of a model so far, hold more tensors than any model."""
    if count > MAX_TENSORS:
        raise InputError(f"{where}: {count:,} tensors, more than {MAX_TENSORS:,}, which no model has")


def nbytes_of(dtype: str, numel: int) -> int:
    """Bytes of `numel` elements of a dtype or block type; of the latter they are whole blocks."""
    if dtype in QUANTS:
        weights, size = QUANTS[dtype]
        return numel // weights * size
    return numel * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of `path`."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """`rounds` rounds of extents, one after another: in each round an extent begins `step` bytes further on.

    So lie the rows of a matrix that was split by columns: a piece of each row in every rank's file.
    """

    rounds: int
    pieces: tuple[tuple[Extent, int], ...]

    @property
    def width(self) -> int:
        """Bytes of one round."""
        return sum(extent.length for extent, _ in self.pieces)

    def __iter__(self) -> Iterator[Extent]:
        for number in range(self.rounds):
            for extent, step in self.pieces:
                yield Extent(extent.path, extent.offset + number * step, extent.length)

    def between(self, start: int, end: int) -> Iterator[Stripe]:
        """Bytes `start` to `end` of all rounds: whole rounds as one stripe, and the ends of those that are cut."""
        width = self.width
        while start < end:
            number, inside = divmod(start, width)
            if inside or end - start < width:
                stop = min(end, (number + 1) * width)
                yield from map(alone, _within(self._from(number, 1), inside, stop - number * width))
            else:
                stop = end // width * width
                yield self._from(number, (stop - start) // width)
            start = stop

    def _from(self, number: int, rounds: int) -> Stripe:
        moved = ((Extent(e.path, e.offset + number * step, e.length), step) for e, step in self.pieces)
        return Stripe(rounds, tuple(moved))


@dataclass(frozen=True, slots=True)
class Striped:
    """The extents of a tensor that lies in more of them than are to be held in memory: made when they are asked for."""

    stripes: tuple[Stripe, ...]

    def __iter__(self) -> Iterator[Extent]:
        return chain.from_iterable(self.stripes)

    def __len__(self) -> int:
        return sum(stripe.rounds * len(stripe.pieces) for stripe in self.stripes)

    def __getitem__(self, index: int) -> Extent:
        return next(islice(self, index, None))


Extents = tuple[Extent, ...] | Striped


def alone(extent: Extent) -> Stripe:
    """An extent as a stripe."""
    return Stripe(1, ((extent, 0),))


def stripes_of(extents: Extents) -> Iterable[Stripe]:
    return extents.stripes if isinstance(extents, Striped) else map(alone, extents)


def cut(extents: Extents, start: int, length: int) -> Iterator[Stripe]:
    """`length` bytes from byte `start` on of what lies in the extents."""
    for stripe in stripes_of(extents):
        size = stripe.width * stripe.rounds
        if start < size and length > 0:
            take = min(size - start, length)
            yield from stripe.between(start, start + take)
            length -= take
            start = 0
        else:
            start = max(0, start - size)


def gathered(stripes: Iterable[Stripe]) -> Extents:
    """The same bytes in as few extents as can be."""
    found: list[Stripe] = []
    for stripe in stripes:
        (extent, _), *more = stripe.pieces
        (last, _), *others = found[-1].pieces if found else ((None, 0),)
        plain = stripe.rounds == 1 and not more and not others and last is not None and found[-1].rounds == 1
        if plain and last is not None and (last.path, last.offset + last.length) == (extent.path, extent.offset):
            found[-1] = alone(Extent(last.path, last.offset, last.length + extent.length))
        else:
            found.append(stripe)
    if all(stripe.rounds == 1 for stripe in found):
        return tuple(extent for stripe in found for extent in stripe)
    return Striped(tuple(found))


def _within(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """Bytes `start` to `end` of extents."""
    for extent in extents:
        first, stop = max(start, 0), min(end, extent.length)
        if first < stop:
            yield Extent(extent.path, extent.offset + first, stop - first)
        start, end = start - extent.length, end - extent.length


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies on disk; holds no data.

    Its bytes are the `extents`, one after another (several when a tensor is spread over files, as in
    ZeRO partitions). `strides` is None for row-major contiguous data; otherwise it counts elements, the
    single extent is the span from the first to the last element that the view touches, and element
    (0, ..., 0) is the first of that span.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: Extents
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.numel)

    @property
    def paths(self) -> frozenset[Path]:
        """The files that its bytes lie in."""
        return frozenset(extent.path for stripe in stripes_of(self.extents) for extent, _ in stripe.pieces)

    def renamed(self, name: str) -> StoredTensor:
        return replace(self, name=name)
