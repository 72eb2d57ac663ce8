"""mmengine's `.pth` of xtuner's training."""

from __future__ import annotations

from llava_convert.layouts.pth.read import NAME, detect, open
from llava_convert.layouts.pth.write import lower, needs

__all__ = ["NAME", "detect", "lower", "needs", "open"]
