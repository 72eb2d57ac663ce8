"""What both models are shown: drawn pictures of every shape, and prompts with and without one. Always the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.prompts import IMAGE, Message
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Probe:
    """A question, about a picture or about none."""

    name: str
    text: str
    size: tuple[int, int] | None = None

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": f"{IMAGE}\n{self.text}" if self.size else self.text}]

    @property
    def pictures(self) -> list[Image]:
        return [drawn(*self.size)] if self.size else []


PROBES = (
    Probe("text", "Name three colours, and say which of them is the warmest."),
    Probe("square picture", "What is in this picture?", (336, 336)),
    Probe("wide picture", "Describe the picture in one sentence.", (480, 240)),
    Probe("tall picture", "Which colours are there?", (200, 420)),
)


def drawn(width: int, height: int) -> Image:
    """A picture with a gradient, edges, and something in every corner, so that a crop or a shift is seen."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    canvas: Any = np.empty((height, width, 3))
    canvas[..., 0] = 255 * x / max(1, width - 1)
    canvas[..., 1] = 255 * y / max(1, height - 1)
    canvas[..., 2] = 127 + 127 * np.sin(x / 9) * np.cos(y / 13)
    radius = min(width, height) / 6
    for cx, cy, colour in (
        (0.15, 0.2, (250, 30, 30)),
        (0.8, 0.25, (30, 220, 60)),
        (0.25, 0.8, (250, 240, 40)),
        (0.75, 0.75, (20, 20, 240)),
    ):
        canvas[(x - cx * width) ** 2 + (y - cy * height) ** 2 < radius**2] = colour
    return Image.fromarray(canvas.astype(np.uint8))
