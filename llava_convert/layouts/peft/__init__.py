"""An adapter folder of peft over a transformers LLaVA, or over one part of it."""

from __future__ import annotations

from llava_convert.layouts.peft.read import NAME, detect, detect_beside, open
from llava_convert.layouts.peft.write import lower, needs

__all__ = ["NAME", "detect", "detect_beside", "lower", "needs", "open"]
