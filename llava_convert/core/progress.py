"""Where a run talks to while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Say(Protocol):
    """Where a conversion talks to: lines, and progress in bytes. The default is silence."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def start(self, what: str, total: int) -> Callable[[int], None]: ...


class Silence:
    """Says nothing."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def start(self, what: str, total: int) -> Callable[[int], None]:
        return lambda done: None
