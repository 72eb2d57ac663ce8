"""The mmengine `.pth` that xtuner's training leaves. A source only."""

from __future__ import annotations

from llava_convert.layouts.pth.read import NAME, detect, open

__all__ = ["NAME", "detect", "open"]
