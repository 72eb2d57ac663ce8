"""The official LLaVA layout (haotian-liu/LLaVA)."""

from __future__ import annotations

from llava_convert.layouts.official.read import NAME, detect, open
from llava_convert.layouts.official.write import lower, needs

__all__ = ["NAME", "detect", "lower", "needs", "open"]
