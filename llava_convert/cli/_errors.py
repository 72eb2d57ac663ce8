"""Exceptions become one sentence and an exit code here, so that commands hold no try."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llava_convert.cli._output import Output
from llava_convert.core.errors import ConvertError, Interrupted, TransferInterrupted, UsageError, system_errors

INTERRUPTED = 130
OUR_BUG = 1


def run(action: Callable[[], None], output: Output) -> int:
    """Do what a command does; returns the exit code."""
    try:
        with system_errors():
            action()
        output.finish()
    except ConvertError as problem:
        if output.verbose:
            _traceback()
        hint = problem.hint
        if hint is None and isinstance(problem, UsageError):
            hint = f"`llava-convert {output.command} --help` lists arguments and options"
        output.error(problem.message, hint, problem.exit_code)
        return problem.exit_code
    except TransferInterrupted as stop:
        output.error(str(stop), None, INTERRUPTED)
        _end_now()
    except KeyboardInterrupt as stop:
        output.error(str(stop) if isinstance(stop, Interrupted) else "interrupted", None, INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: not an error of ours. Nothing more may be written to it.
        _silence_stdout()
    except Exception as problem:  # the one place where a bug of ours becomes a sentence
        if output.verbose:
            _traceback()
        output.error(
            f"this is a bug in llava-convert: {type(problem).__name__}: {problem}",
            "run it again with --verbose and report what it prints",
            OUR_BUG,
        )
        return OUR_BUG
    finally:
        output.stop()
    return 0


def _end_now() -> NoReturn:
    """Leave without waiting for the transfers that a hub's client has under way in threads, each of a whole file."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def _silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
