"""The nouns at the bottom: where a tensor's bytes are, and what a dtype is called.

Dtypes are named as safetensors names them ("F32", "BF16", ...), in every module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

# Size of one element in bits; the names are safetensors 0.8's (F4 packs two in a byte).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# What `--dtype` and config.json call the dtypes that a model can be cast to.
TORCH_NAMES: dict[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
FROM_TORCH_NAMES: dict[str, str] = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of `path`."""

    path: Path
    offset: int
    length: int


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
    extents: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8

    def renamed(self, name: str) -> StoredTensor:
        return replace(self, name=name)
