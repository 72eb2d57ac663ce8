"""The package's errors, one class per exit code.

`message` says what was found, where, and what was expected. `hint` is the next step: what fixes it, a command if there
is one. An error that is raised without a hint has that of its class;
of a UsageError the command line knows which help to name. Errors are raised anywhere and printed in one
place (`cli/_errors.py`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from llava_convert.core.text import did_you_mean, escaped, printable

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_NO_THREAD = "can't start new thread"
MISSING = "no such file"
_READING_HINTS = {
    errno.ENOENT: "see whether the path is right",
    errno.EACCES: "let yourself read it (chmod, chown), or run as a user who may",
    errno.EPERM: "let yourself read it (chmod, chown), or run as a user who may",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.EIO: "the disk, or the mount that it is on, fails: try again, or copy it from elsewhere",
}


class ConvertError(Exception):
    """Base of every error that the user can fix.

    `exit_code` is the process's exit status, `usual_hint` the hint of an error that is raised without one.
    """

    exit_code = 1
    usual_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # Names from files stand in messages, and a terminal obeys escape sequences (tests/fuzz found several such).
        message = escaped(message, keep="\n")
        super().__init__(message)
        self.message = message
        self.hint = self.usual_hint if hint is None else hint

    def __reduce__(self) -> tuple[object, ...]:
        """Whole in another process, which an exception with a keyword of its own is not by itself."""
        return _again, (type(self), *self.args), vars(self)

    def reword(self, words: Callable[[str], str]) -> None:
        """Say it otherwise: a folder by the address that the user knows it by, say."""
        self.message = words(self.message)
        self.hint = self.hint if self.hint is None else words(self.hint)
        self.args = (self.message,)


def _again(kind: type[ConvertError], *arguments: object) -> ConvertError:
    return kind.__new__(kind, *arguments)


class UsageError(ConvertError):
    """The command line asks for something that makes no sense (exit 2)."""

    exit_code = 2


class InputError(ConvertError):
    """The input is corrupt, incomplete or missing (exit 3).

    `unread` is the path of a file that the system does not let us read, where it is of one.
    """

    exit_code = 3
    usual_hint = "use another copy of the source: download or save it again"
    unread: str | None = None


class UnsupportedError(ConvertError):
    """The input is sound but unsupported, or can be read in more than one way (exit 4)."""

    exit_code = 4
    usual_hint = "`llava-convert layouts` lists what is supported"


class UnsafeError(ConvertError):
    """The input tries to run code, to leave its folder, or to exhaust the machine (exit 5)."""

    exit_code = 5
    usual_hint = "use files from a source that you trust"


class OutputError(ConvertError):
    """The output exists, is in use, or cannot be written (exit 6)."""

    exit_code = 6
    usual_hint = "choose another place with -o"


class MismatchError(ConvertError):
    """Verification found a difference, or a cast would lose finite values (exit 7)."""

    exit_code = 7
    usual_hint = "`llava-convert verify SOURCE OUT --verbose` shows every difference"


def not_a_choice(option: str, word: object, known: Collection[str]) -> UsageError:
    """The UsageError for a word that an option does not take: it lists those that it takes, and names the nearest."""
    text = f"{option} {printable(word)}: the choices are {', '.join(known)}"
    return UsageError(text, hint=did_you_mean(str(word), known))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal to end, where it is known how things stand: its text says so (exit 130)."""


class TransferInterrupted(Interrupted):
    """The same while files go to a hub: some may still be under way. Its text says how to go on."""


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as a ConvertError what the system refuses anywhere in a job, and nothing nearer to the call foresaw.

    stat, open or listdir of a source's file can fail wherever it stands; a container may grant no memory or no thread.
    A closed pipe is not among these: whoever prints knows what it means.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        where = os.fsdecode(problem.filename) if isinstance(problem.filename, str | bytes) else "a file"
        if problem.errno not in _OF_THE_DISK:
            raise unreadable(where, problem) from problem
        hint = "free some space, or choose another place"
        raise OutputError(f"{printable(where)}: {problem.strerror or problem}", hint=hint) from problem
    except MemoryError as problem:
        raise OutputError("there is not enough memory", hint="--threads 1 needs the least") from problem
    except RuntimeError as problem:  # what threading raises has no class of its own
        if _NO_THREAD not in str(problem):
            raise
        raise OutputError("the system starts no further thread", hint="raise its limit of processes") from problem


def os_reason(problem: OSError | ValueError) -> str:
    """What the system said, without the path (which the message has already)."""
    return (problem.strerror or str(problem)) if isinstance(problem, OSError) else str(problem)


def unreadable(where: object, problem: OSError | ValueError, what: str = "cannot be read") -> InputError:
    """The InputError for what the system refuses to read, with what helps. A ValueError is a path that cannot be.

    `what` is what cannot be done; MISSING says all by itself.
    """
    code = problem.errno if isinstance(problem, OSError) else None
    hint = _READING_HINTS.get(code or 0, "see whether it is there and may be read")
    reason = "" if what.startswith(MISSING) else f": {os_reason(problem)}"
    error = InputError(f"{printable(where)}: {what}{reason}", hint=hint)
    error.unread = str(where)
    return error


class HubError(ConvertError):
    """A hub or the network refused (exit 8)."""

    exit_code = 8
    usual_hint = "run the same command again later"
