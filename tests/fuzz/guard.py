"""What every reader must keep to, whatever bytes it gets: refuse by name, stay small and quick, and run nothing.

The canary is an audit hook (PEP 578), which sees what Python code cannot hide: files opened, modules imported, code
executed, processes started, sockets made. While a reader runs, everything is forbidden but the few events in
`_HARMLESS` and reading below the one folder that holds its input.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_convert.core.errors import ConvertError, InputError, UnsafeError, UnsupportedError

SECONDS = 10.0  # for inputs of at most 64 KiB, which take milliseconds
PEAK_BYTES = 192 << 20
MAX_MESSAGE = 8000

# What a reader may import when it first needs it: imported here, so that any import while it runs is a finding.
_CODECS = ("cp437", "raw_unicode_escape", "unicode_escape", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be")
# atheris imports faulthandler to tell of a slow input.
_LAZY = ("difflib", "faulthandler", "encodings.utf_32_le", *(f"encodings.{name}" for name in _CODECS))
_HARMLESS = frozenset({"builtins.id", "sys._getframe", "object.__getattr__", "time.sleep"})
_LISTINGS = frozenset({"os.listdir", "os.scandir"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Read = Callable[[], None]


class FindingError(BaseException):
    """A reader broke a promise. No Exception, so that no reader can take it for a fault of its input."""


class _Canary:
    """The hook, which Python never lets go of again. It watches one thread, and only while `folder` is set."""

    def __init__(self) -> None:
        self.folder = ""
        self.thread = 0
        self.found: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or event in _HARMLESS or threading.get_ident() != self.thread:
            return
        if not self.allowed(event, args):
            # Kept as well as raised: whatever calls us may swallow what it gets.
            self.found.append(f"{event} {repr(args)[:200]}")
            raise FindingError(self.found[0])

    def allowed(self, event: str, args: tuple[Any, ...]) -> bool:
        if event in _LISTINGS:
            return self.inside(args[0])
        if event == "open":
            path, mode, flags = args
            reads = not set(mode or "r") & set("wax+") and not (flags or 0) & _WRITING
            # A syntax error makes Python 3.11 look for the line in a file called so, in the current folder.
            return reads and (isinstance(path, int) or path == "<unknown>" or self.inside(path))
        # ast.parse makes a tree by compile(); to run anything, an `exec` event would have to follow.
        return event == "compile" and sys._getframe(2).f_globals.get("__name__") == "ast"

    def inside(self, path: object) -> bool:
        return isinstance(path, str) and os.path.realpath(path).startswith(self.folder)


_canary: list[_Canary] = []


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raises FindingError where the block does more than read files below `folder`."""
    if not _canary:
        for name in _LAZY:
            importlib.import_module(name)
        _canary.append(_Canary())
    canary = _canary[0]
    canary.found.clear()
    canary.thread, canary.folder = threading.get_ident(), os.path.realpath(folder)
    try:
        yield
    finally:
        canary.folder = ""
        if canary.found:  # also where the block raised something in its place
            raise FindingError(canary.found[0])


@contextmanager
def bounded(seconds: float = SECONDS, peak: int | None = PEAK_BYTES) -> Iterator[None]:
    """Raises FindingError where the block takes longer, or allocates more: None where that is not to be traced.

    The seconds are the process's own, so that a busy machine fails no test. libFuzzer has limits of its own, which also
    see into C.
    """

    def late(*_: object) -> None:
        raise FindingError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    if peak is not None:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        used = tracemalloc.get_traced_memory()[1]
        if peak is not None:
            tracemalloc.stop()
    if peak is not None and used > peak:
        raise FindingError(f"allocated {used:,} bytes")


def accepts(read: Read, folder: Path) -> bool:
    """Whether `read` takes its input; a refusal must be one of the three that an input can deserve, and printable.

    Raises FindingError, with the exception that escaped as its cause.
    """
    try:
        with watched(folder):
            read()
    except (InputError, UnsupportedError, UnsafeError) as refusal:
        _check_refusal(refusal)
        return False
    except FindingError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise FindingError(f"{type(error).__name__} escaped: {str(error)[:200]}") from error
    return True


def _check_refusal(refusal: ConvertError) -> None:
    text = f"{refusal.message}\n{refusal.hint or ''}"
    if not refusal.message or len(text) > MAX_MESSAGE or not all(line.isprintable() for line in text.split("\n")):
        raise FindingError(f"a message that cannot be shown: {text[:400]!r}") from refusal
