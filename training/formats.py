"""Formats of data files: what a JSON value of each says, as conversations about pictures.

One function a format, and a row of `FORMATS`. RefCOCO's follow xtuner 0.1.23 (dataset/refcoco_json.py): each box is
asked about in every wording, one conversation each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_HALF = re.compile("[\ud800-\udfff]")
# A conversation: the name of its picture, and who says what (`human`, `gpt` or `system`).
Said = tuple[str | None, tuple[tuple[str, str], ...]]

# Where is it? `{}` is the description.
REFER = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
# What is there? `{}` is the box.
IDENTIFY = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)


class NotThis(ValueError):
    """Why a value is not one of its format; the reader of the file says where it stands."""


@dataclass(frozen=True)
class Format:
    """`read` gives the conversations of one value, or raises NotThis; `xtuner` is the class there, by its module."""

    read: Callable[[Any], Iterator[Said]]
    xtuner: tuple[str, str]


def _conversation(value: Any) -> Iterator[Said]:
    """`conversations` of `from` and `value`; other programs say `messages`, `role` and `content`."""
    kind = "a conversation"
    said = _object(value, kind).get("conversations", value.get("messages"))
    if not isinstance(said, list):
        raise NotThis(f"not {kind}: it has no list `conversations`, and no list `messages`")
    messages = []
    for message in said:
        role, text = (_either(message, *keys) for keys in (("from", "role"), ("value", "content")))
        if not isinstance(role, str) or role not in ROLES:
            raise NotThis(f"not {kind}: a message is from {role!r}, and not one of {', '.join(ROLES)}")
        messages.append((ROLES[role], _text(text, f"what {role} says", kind)))
    yield _picture(value, kind), tuple(messages)


def _boxes(value: Any, *, questions: Sequence[str], answer_is_box: bool) -> Iterator[Said]:
    """A conversation for each question about `sents`, which lies in `bbox` (x, y, width, height, in pixels).

    Corners are hundredths of the picture's own `width` and `height`, rounded down. Pictures are padded to squares after
    that, and the numbers stay as they are, as in xtuner.
    """
    kind = "a box of RefCOCO"
    value = _object(value, kind)
    name = _text(value.get("sents"), "`sents`", kind)
    box, sizes = value.get("bbox"), [value.get("width"), value.get("height")]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise NotThis(f"not {kind}: `bbox` is not four numbers (x, y, width, height)")
    if not all(_is_number(size) and size > 0 for size in sizes):
        raise NotThis(f"not {kind}: `width` and `height` of the picture are not numbers above 0")
    x, y, across, down = box
    width, height = sizes
    corners = (x / width, y / height, (x + across) / width, (y + down) / height)
    place = "{" + "".join(f"<{int(corner * 100)}>" for corner in corners) + "}"
    asked, answer = (name, place) if answer_is_box else (place, name)
    image = _picture(value, kind)
    for question in questions:
        yield image, (("human", f"{question.format(asked)}\n<image>"), ("gpt", answer))


_XTUNER = "xtuner.dataset.refcoco_json"
_refer = partial(_boxes, questions=REFER, answer_is_box=True)
_identify = partial(_boxes, questions=IDENTIFY, answer_is_box=False)

FORMATS: dict[str, Format] = {
    "conversations": Format(_conversation, ("xtuner.dataset", "LLaVADataset")),
    "refcoco": Format(_refer, (_XTUNER, "RefCOCOJsonDataset")),
    "refcoco_inverse": Format(_identify, (_XTUNER, "InvRefCOCOJsonDataset")),
}


def _object(value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise NotThis(f"not {kind}: not an object")
    return value


def _text(value: Any, what: str, kind: str) -> str:
    if not isinstance(value, str):
        raise NotThis(f"not {kind}: {what} is not text")
    if _HALF.search(value):
        raise NotThis(f"not {kind}: {what} holds half a character (a lone surrogate)")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _either(message: Any, *keys: str) -> Any:
    return next((message[key] for key in keys if key in message), None) if isinstance(message, dict) else None


def _picture(value: Mapping[str, Any], kind: str) -> str | None:
    """The picture of a value; an empty name is none."""
    found = value.get("image", value.get("images"))
    if isinstance(found, list):
        if len(found) > 1:
            raise NotThis(f"not {kind}: it is about {len(found)} pictures, and one is the most")
        found = found[0] if found else None
    if not (found is None or isinstance(found, str)):
        raise NotThis(f"not {kind}: its picture is {type(found).__name__}, not a name")
    return found or None
