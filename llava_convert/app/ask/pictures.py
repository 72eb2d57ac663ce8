"""Pictures as a LLaVA sees them: opened from anywhere, padded to squares, made pixels."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.assets.processor import squared
from llava_convert.core.errors import HubError, InputError, UnsupportedError, UsageError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image

PAD = "pad"
_SCHEMES = ("http://", "https://")
_MOST_BYTES = 100_000_000
_PATIENCE = 30  # seconds


def open_picture(place: str | Path) -> Image:
    """A picture from a file, a URL or a data: URL, as RGB.

    Raises InputError where there is none, HubError where the network refuses, UsageError without pillow.
    """
    text = str(place)
    if text.startswith(_SCHEMES):
        return decoded(_fetched(text), text)
    if text.startswith("data:"):
        return from_base64(text.partition(",")[2], "the data: URL")
    try:
        data = Path(text).expanduser().read_bytes()
    except OSError as problem:
        raise InputError(
            f"{printable(text)}: {problem.strerror or problem}", hint="--image takes a file or a URL"
        ) from problem
    return decoded(data, text)


def from_base64(text: str, where: str) -> Image:
    """The picture that a text encodes. Raises InputError, which says where it stood."""
    try:
        data = base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as problem:
        raise InputError(f"{where}: not base64: {problem}", hint="encode the picture's file again") from problem
    return decoded(data, where)


def decoded(data: bytes, where: str) -> Image:
    """The picture in a file's bytes, as RGB. Raises InputError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UsageError(
            "pictures need pillow, which is not installed", hint="pip install 'llava-convert[chat]'"
        ) from None
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(
            f"{printable(where)}: not a picture that pillow can read ({len(data)} bytes)",
            hint="give a PNG, JPEG, WebP or BMP file",
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise InputError(f"{printable(where)}: a broken picture: {problem}", hint="get it again") from problem


def _fetched(url: str) -> bytes:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from llava_convert._version import __version__

    asked = Request(url, headers={"User-Agent": f"llava-convert/{__version__}"})
    try:
        with urlopen(asked, timeout=_PATIENCE) as answer:
            data: bytes = answer.read(_MOST_BYTES + 1)
    except HTTPError as problem:
        raise HubError(
            f"{printable(url)}: the server answers {problem.code} {problem.reason}",
            hint="download the picture, and give its file",
        ) from problem
    except (URLError, OSError, ValueError) as problem:
        raise HubError(f"{printable(url)}: {problem}", hint="give a file by --image") from problem
    if len(data) > _MOST_BYTES:
        raise InputError(
            f"{printable(url)}: more than {_MOST_BYTES // 10**6} MB, which no picture has",
            hint="give the address of the picture itself",
        )
    return data


@dataclass(frozen=True)
class Eyes:
    """How a model's pictures are prepared: `config` is a preprocessor_config.json, `aspect` how they are cut."""

    config: Mapping[str, Any]
    aspect: str | None

    def __post_init__(self) -> None:
        if self.aspect not in (PAD, "square", None):
            raise UnsupportedError(
                f"image_aspect_ratio {printable(str(self.aspect))}: pictures cut into tiles are not run here",
                hint="convert it, and ask it with a program that does",
            )

    @cached_property
    def _processor(self) -> Any:
        import transformers

        kind = str(self.config.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast")
        # transformers 5 has the processor that computes as all earlier ones did under this name; its other one, by
        # torchvision, makes slightly other pixels.
        cls = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
        known = {k: v for k, v in self.config.items() if k not in ("image_processor_type", "processor_class")}
        return cls(**known)

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self._processor.image_mean)

    def pixels(self, picture: Image) -> Any:
        """(1, 3, size, size) float32, as training saw the picture."""
        if self.aspect == PAD:
            picture = squared(picture, tuple(int(x * 255) for x in self.mean))
        return self._processor.preprocess(picture, return_tensors="pt")["pixel_values"]
