"""Text made fit for messages and for files: names from strangers' files, lists of them, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any

# The longest tensor name seen in a real model has 107 characters.
_LONGEST_SHOWN = 120
_LONGEST_PATH = 400  # of a file that is there: it may be put into other words as a whole
_LISTED = 8
# Surrogates but for those by which os.fsdecode stands in for bytes that are not text (PEP 383).
_NO_ESCAPED_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def to_json(value: Any) -> bytes:
    """JSON as every config here is written: two spaces, UTF-8, a newline at the end."""
    return utf8(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def utf8(text: str) -> bytes:
    """Text with names of files in it, which need not be of the locale's encoding, or of any: then `�` stands there.

    So it does for a lone surrogate, which JSON can spell and UTF-8 cannot.
    """
    escaped = _NO_ESCAPED_BYTE.sub("�", text)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def escaped(text: str, *, keep: str = "") -> str:
    """`text` without what a terminal obeys: what str.isprintable refuses (NUL, newlines, right-to-left marks, lone
    surrogates) is written as an escape, but for the characters in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def printable(name: object) -> str:
    """A name from a stranger's file, fit for a message of one line: escaped, and where it is long without its middle.

    The end stays, since of a path it is what tells files apart.
    """
    text, longest = str(name), _LONGEST_PATH if isinstance(name, PurePath) else _LONGEST_SHOWN
    shown = escaped(text[: longest + 1])
    if len(shown) <= longest:
        return shown
    tail = escaped(text[-longest:])[-longest * 2 // 3 :]
    return f"{shown[: longest // 3]}…{tail} ({len(text)} characters)"


def listed(names: Iterable[object], limit: int = _LISTED) -> str:
    """The first `limit` names, and how many more there are."""
    every = list(names)
    head = ", ".join(printable(name) for name in every[:limit])
    return head if len(every) <= limit else f"{head} and {len(every) - limit:,} more"


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that a mistyped one is nearest to, in any case; None if none is near."""
    from difflib import get_close_matches  # only where something is wrong

    lower = {one.lower(): one for one in known}
    close = get_close_matches(word.strip().lower(), lower, n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def did_you_mean(word: str, known: Collection[str]) -> str | None:
    """The question for a mistyped word, `did you mean hf?`; None if no known word is near."""
    near = nearest(word, known)
    return None if near is None else f"did you mean {printable(near)}?"


def human_bytes(count: int) -> str:
    """`16.1 GB`: decimal, as disks and hubs count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
