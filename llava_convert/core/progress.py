"""Progress and messages of a running job."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol, runtime_checkable


@runtime_checkable
class Reporter(Protocol):
    """Receives the notes, warnings and progress of a job.

    `start` is called when a stage begins, with its name and its total in bytes. The function that it returns is called
    with the bytes of each step, from several threads.
    """

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def start(self, what: str, total: int) -> Callable[[int], None]: ...


# Called with the bytes done of the stage that runs, and with its total.
OnBytes = Callable[[int, int], object]


def stage(say: Reporter, what: str | None) -> None:
    """Report a stage that has no total, to a reporter that can show one. None ends it: something else is shown now."""
    begin: Callable[[str | None], None] | None = getattr(say, "stage", None)
    if begin is not None:
        begin(what)


def names_files(say: Reporter) -> Callable[[str], None]:
    """What is called with the name of each file as the work on it begins."""
    name: Callable[[str], None] = getattr(say, "file", lambda _: None)
    return name


def counted(say: Reporter, what: str, total: int) -> Callable[[int], None]:
    """Progress that counts things and no bytes, where the reporter can show it; else what `start` makes of it."""
    count: Callable[[str, int], Callable[[int], None]] = getattr(say, "count", say.start)
    return count(what, total)


class Silence:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def start(self, what: str, total: int) -> Callable[[int], None]:
        return lambda done: None


class Bytes(Silence):
    """A reporter that calls a function with the bytes done and the total, one call at a time."""

    def __init__(self, call: OnBytes) -> None:
        self._call = call

    def start(self, what: str, total: int) -> Callable[[int], None]:
        lock, done = Lock(), 0

        def advance(step: int) -> None:
            nonlocal done
            with lock:
                done += step
                self._call(done, total)

        self._call(0, total)
        return advance


def reporter(progress: Reporter | OnBytes | None) -> Reporter:
    """What a job reports to, of what a caller gives."""
    if progress is None:
        return Silence()
    return progress if isinstance(progress, Reporter) else Bytes(progress)
