"""Files of our own in a folder that others can write to: no link is followed, nothing waits, no inode is shared.

A name like `.OUT.partial.lock` can be taken before we come: by a link to a file that somebody needs, by a second name
of it, or by a pipe that waits for a writer for ever. So a name is looked at before it is opened, and the file that was
opened is looked at again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from llava_convert.core.errors import OutputError

# Each flag is absent on some system.
_SAFE = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def create_own(path: Path) -> int:
    """A descriptor to read and write a new file. Raises FileExistsError where the name is taken, even by a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)


def open_own(path: Path) -> int:
    """A descriptor to read and write our file at `path`, made where there is none.

    Raises OutputError (exit 6) for what cannot be ours: a link, a second name of a file, a pipe, a folder.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            seen = _require_own(path, os.lstat(path))
            fd = os.open(path, os.O_RDWR | _SAFE)
            try:
                opened = _require_own(path, os.fstat(fd))
                if os.path.samestat(seen, opened):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            continue
        with contextlib.suppress(FileExistsError):
            return create_own(path)


def is_own(path: Path) -> bool:
    """Whether a regular file with no second name is at `path`, and no link leads there."""
    try:
        _require_own(path, os.lstat(path))
    except (OSError, OutputError):
        return False
    return True


def _require_own(path: Path, info: os.stat_result) -> os.stat_result:
    if stat.S_ISREG(info.st_mode) and info.st_nlink < 2:
        return info
    what = "a link" if stat.S_ISLNK(info.st_mode) else "a file with a second name (a hard link)"
    if not stat.S_ISLNK(info.st_mode) and not stat.S_ISREG(info.st_mode):
        what = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, a socket or a device"
    raise OutputError(
        f"{path} is {what}; a conversion needs that name for a file of its own",
        hint="see what it is, and move it away; or choose another place with -o",
    )
