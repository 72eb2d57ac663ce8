"""Signals: those that ask the process to end become an exception, and wait where steps belong together.

Handlers are the process's, and Python lets the main thread alone set and run them. So elsewhere all of this does
nothing, and need not: a signal is raised in the main thread, and never between two steps of another.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM (or the loss of the terminal) asked the process to end; handled like Ctrl-C, exit 130."""


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM, SIGHUP and SIGBREAK into `Terminated` while the block runs; does nothing off the main thread."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    # An ignored SIGHUP is nohup's wish, hence kept.
    with _handling(terminate, "SIGTERM", "SIGHUP", "SIGBREAK"):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back until the block is done, so that nothing stops between two steps which belong together."""
    caught: list[int] = []
    with _handling(lambda number, frame: caught.append(number), "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        yield
    if caught:
        signal.raise_signal(caught[0])


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *names: str) -> Iterator[None]:
    if not _on_main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: h for n in numbers if (h := signal.getsignal(n)) not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def fail_beyond_size_limit() -> None:
    """Let a write beyond `ulimit -f` fail with EFBIG instead of ending the process, as Python does at its start."""
    if hasattr(signal, "SIGXFSZ") and _on_main_thread():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
