"""xtuner's own layout: language model, projector and vision tower each in a folder."""

from __future__ import annotations

from llava_convert.layouts.xtuner.read import NAME, detect, open
from llava_convert.layouts.xtuner.write import lower, needs

__all__ = ["NAME", "detect", "lower", "needs", "open"]
