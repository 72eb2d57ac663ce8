"""Trying again what may go well the next time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONGEST = 60.0  # seconds that a server may ask for


def patiently(
    action: Callable[[], T],
    errors: type[Exception] | tuple[type[Exception], ...],
    pause: Callable[[Exception, int], float | None],
    *,
    tries: int,
) -> T:
    """What `action` gives, done up to `tries` times.

    `pause` is asked after the n-th of `errors` for how many seconds to wait, and says None where there is no use. The
    last error is raised as it is.
    """
    for attempt in range(1, tries):
        try:
            return action()
        except errors as problem:
            seconds = pause(problem, attempt)
            if seconds is None:
                raise
            time.sleep(min(seconds, LONGEST))
    return action()
