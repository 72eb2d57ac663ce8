"""The nouns at the bottom: where a tensor's bytes are, and what a dtype is called.

Dtypes are named as safetensors names them ("F32", "BF16", ...), in every module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from llava_convert.core.errors import InputError

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
        return nbytes_of(self.dtype, self.numel)

    def renamed(self, name: str) -> StoredTensor:
        return replace(self, name=name)
