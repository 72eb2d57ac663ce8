"""GGUF, llama.cpp's format: a language model, and an mmproj with vision tower and projector."""

from __future__ import annotations

from llava_convert.layouts.gguf.compare import compare_stated
from llava_convert.layouts.gguf.mixes import file_types
from llava_convert.layouts.gguf.names import dialects, family_name
from llava_convert.layouts.gguf.read import NAME, detect, made_with, open, open_each
from llava_convert.layouts.gguf.write import lower, needs

__all__ = [
    "NAME",
    "compare_stated",
    "detect",
    "dialects",
    "family_name",
    "file_types",
    "lower",
    "made_with",
    "needs",
    "open",
    "open_each",
]
