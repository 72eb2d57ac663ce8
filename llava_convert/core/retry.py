"""Trying again what may succeed the next time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from llava_convert.core.errors import HubError

T = TypeVar("T")

TRIES = 6  # of ranges, in a row without a byte; with these pauses they take 12 seconds
FIRST_TRIES = 3  # of a first question: its name may be a typing error, and nothing is lost yet
FIRST_PAUSE = 0.2  # seconds; each pause is GROWTH times the one before
GROWTH = 2.5
LONGEST = 60.0  # seconds that a server may ask for


class TransientError(Exception):
    """A failure that may pass: a busy server, a broken connection. `after` is the pause that the server asks for."""

    def __init__(
        self, reason: str, after: float | None = None, *, hint: str = "run the same command again later"
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = after
        self.hint = hint


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header; None for its other form, a date, which servers of models do not send."""
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else None


def patiently(where: str, attempt: Callable[[], T], *, tries: int = TRIES, slower: float = 1.0) -> T:
    """Return the result of `attempt`, tried again after a TransientError with growing pauses.

    The pauses are multiplied by `slower`. Raises HubError (exit 8) after the last try; other errors pass through.
    """
    for number in range(1, tries):
        try:
            return attempt()
        except TransientError as problem:
            usual = FIRST_PAUSE * GROWTH ** (number - 1) * slower
            time.sleep(min(problem.after if problem.after is not None else usual, LONGEST))
    try:
        return attempt()
    except TransientError as last:
        times = f", {tries} times in a row" if tries > 1 else ""
        error = HubError(f"{where}: {last.reason}{times}", hint=last.hint)
        for note in getattr(last, "__notes__", ()):
            error.add_note(note)
        raise error from None
