"""transformers' LLaVA: `LlavaForConditionalGeneration` and its processor."""

from __future__ import annotations

from llava_convert.layouts.hf.read import NAME, detect, open
from llava_convert.layouts.hf.write import lower, needs

__all__ = ["NAME", "detect", "lower", "needs", "open"]
