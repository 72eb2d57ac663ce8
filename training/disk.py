"""A full disk while something of a run is written: one sentence (exit 6), whoever wrote it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_convert.core.errors import OutputError


def unwritten(problem: OSError, path: Path) -> OutputError:
    """The error of a file that could not be written."""
    return OutputError(
        f"{path} cannot be written: {problem.strerror or problem}",
        hint="the checkpoints before it are whole: make room, then the same command with --resume",
    )


@contextmanager
def writing() -> Iterator[None]:
    """Within it, a full disk is an OSError, also where torch itself writes to the file.

    It answers a write that fails by a RuntimeError that names a line of its own source, without errno.
    """
    try:
        yield
    except RuntimeError as problem:
        if "inline_container" not in str(problem) and "PytorchStreamWriter" not in str(problem):
            raise
        raise OSError(errno.ENOSPC, "the disk is full, or allows no file of that size") from problem
