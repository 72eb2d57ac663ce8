"""Where a runtime finds a model, and how it says that it cannot load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.core.text import printable
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.storage.remote.mounts import remote_of


def folder_of(checkpoint: Checkpoint) -> Path:
    """Where it lies on this machine. Raises UsageError for a model elsewhere."""
    if any(remote_of(path) is not None for path in checkpoint.files):
        raise UsageError(
            "--runtime reads files of this machine", hint="add --cache, which downloads the model, or leave it out"
        )
    return checkpoint.path


def missing(flag: str, what: str, problem: ImportError, pip: str) -> UsageError:
    """The error of a package that cannot be imported."""
    why = f"cannot be imported ({printable(str(problem))})"
    return UsageError(f"{flag} computes with {what}, which {why}", hint=pip)


@contextmanager
def reasoned(name: str, verb: str, what: object) -> Iterator[None]:
    """Raise what a program says where it cannot load or compute something as UnsupportedError."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as problem:
        said = printable(str(problem).strip().split("\n")[0]) or type(problem).__name__
        raise UnsupportedError(
            f"{name} cannot {verb} {what}: {said}", hint="leave --runtime out: this package computes it without"
        ) from problem


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice and its bars to itself."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
