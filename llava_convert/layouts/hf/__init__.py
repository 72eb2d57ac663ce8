"""transformers' LLaVA: `LlavaForConditionalGeneration` and its processor."""

from __future__ import annotations

from llava_convert.layouts.hf.alone import NAME, detect_part
from llava_convert.layouts.hf.read import detect, open
from llava_convert.layouts.hf.write import lower, needs

__all__ = ["NAME", "detect", "detect_part", "lower", "needs", "open"]
