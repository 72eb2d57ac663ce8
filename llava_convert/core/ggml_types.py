"""The types of tensors in GGUF files, by their numbers there."""

from __future__ import annotations

from llava_convert.core.tensors import QUANTS

# ggml.h, enum ggml_type, by the names of `spec`.
TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
NUMBERS = {name: number for number, name in TYPES.items()}
# Files with these were published; llama.cpp gave them up (ggml.h).
GIVEN_UP = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip


def whole_blocks(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether each row of the last dimension is whole blocks, as ggml wants it."""
    return dtype not in QUANTS or (shape[-1] if shape else 1) % QUANTS[dtype][0] == 0
