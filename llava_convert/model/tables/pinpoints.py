"""The sizes that a picture is cut to, in the spellings of LLaVA's code and of transformers.

As a fact they are pairs of width and height, in their order, which decides between sizes that fit alike. LLaVA-NeXT's
code also takes a range of tiles, `(1x1),...,(6x6)` (mm_utils.py), which means sizes once the tower is known.
"""

from __future__ import annotations

import re
from typing import Any

_TILES = re.compile(r"\((\d+)x(\d+)\)")
_PAIR = re.compile(r"[\[(]\s*(\d+)\s*,\s*(\d+)\s*[\])]")
_MOST = 64  # tiles on a side, which no model comes near to


def read(said: Any) -> Any:
    """Pairs of an official config: a list, its text, or a range of tiles, which stays. Raises KeyError for others."""
    if not isinstance(said, str):
        return kept(said)
    if _TILES.search(said):
        return said
    pairs = [[int(width), int(height)] for width, height in _PAIR.findall(said)]
    if not pairs:
        raise KeyError(said)
    return pairs


def kept(pairs: Any) -> Any:
    """Pairs as they are. Raises KeyError for what is no list of pairs."""
    if isinstance(pairs, str) or pairs is None:
        return pairs
    if not all(len(pair) == 2 for pair in pairs):
        raise KeyError(pairs)
    return [list(pair) for pair in pairs]


def swapped(pairs: Any) -> Any:
    """Pairs of height and width, which is how transformers has them, and back."""
    return pairs if pairs is None else [[second, first] for first, second in kept(pairs)]


def in_pixels(pairs: Any, side: int) -> Any:
    """A range of tiles as sizes, for a tower that takes pictures of `side` pixels; pairs stay.

    From get_anyres_image_grid_shape: every number of tiles from the first pair to the last, widths outermost.
    """
    if not isinstance(pairs, str):
        return pairs
    ends = [(int(width), int(height)) for width, height in _TILES.findall(pairs)]
    (left, low), (right, high) = ends[0], ends[-1]
    if max(right, high) > _MOST:
        return pairs
    return [[i * side, j * side] for i in range(left, right + 1) for j in range(low, high + 1)]
