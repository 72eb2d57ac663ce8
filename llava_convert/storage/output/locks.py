"""One process at a time: a lock file that goes with its holder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from llava_convert.core.errors import OutputError
from llava_convert.storage.output.own_files import open_own
from llava_convert.storage.ranges import write_all

# The holder's id and the mark; less, where a power loss left half of it.
_OURS = re.compile(rb"\d{0,20}(?:\n[aside]{0,5}\n?)?")


class Lock:
    """A file locked for as long as the process lives; its lines: the holder's id, and `aside` while OUT is aside.

    The file is removed by its holder only, and whoever gets a lock checks that the name still leads to the file it
    locked: so two processes can never hold "the" lock through two inodes.

    Several may hold it together where it is `shared`; such holders write nothing into it, and leave it where it is.
    """

    def __init__(self, path: Path, out: Path, say: Callable[[str], None], *, shared: bool = False) -> None:
        self.path, self._say, self._shared = path, say, shared
        self.aside = False
        while True:
            self.fd = open_own(path)
            try:
                locked = _lock(self.fd, shared=shared)
            except OSError as exc:  # some network file systems have no locks
                say(f"{path.parent} does not support locks ({exc.strerror}): do not start two conversions into {out}")
                locked = True
            try:
                text = os.read(self.fd, 64)
                mine = locked and self._is_at_its_name()
            except BaseException:
                self.release(keep=not locked or not self._is_empty())  # a mark of another run is not lost
                raise
            if mine:
                break
            os.close(self.fd)
            if not locked:
                holder = text.split(b"\n")[0].decode("ascii", "replace")
                who = f"process {holder}" if holder else "another process"
                raise OutputError(f"{out} is in use by {who}", hint="wait for it, or end it")
        if not _OURS.fullmatch(text):
            os.close(self.fd)
            raise OutputError(
                f"{path} holds something else than a lock of a conversion; a conversion needs that name",
                hint="see what it is, and move it away; or choose another place with -o",
            )
        self.aside = text.endswith(b"\naside\n")
        if shared:
            return
        try:
            self.record(aside=self.aside)
        except BaseException:
            self.release(keep=self.aside)
            raise

    def record(self, *, aside: bool) -> None:
        os.ftruncate(self.fd, 0)
        write_all(self.fd, 0, b"%d\n%s" % (os.getpid(), b"aside\n" if aside else b""))
        if aside:
            os.fsync(self.fd)

    def release(self, *, keep: bool = False) -> None:
        """Let go of the lock, and remove its file unless `keep`; says so where that fails. Raises nothing."""
        with contextlib.suppress(OSError):  # closed it is, whatever the system says
            if sys.platform == "win32":  # an open file cannot be removed there
                os.close(self.fd)
        if not keep and not self._shared:
            try:
                if sys.platform == "win32" or self._is_at_its_name():
                    self.path.unlink()
            except FileNotFoundError:
                pass
            except OSError as exc:
                self._say(f"{self.path} could not be removed: {exc.strerror or exc}; the next run does")
        with contextlib.suppress(OSError):
            if sys.platform != "win32":
                os.close(self.fd)

    def _is_empty(self) -> bool:
        with contextlib.suppress(OSError):
            return os.fstat(self.fd).st_size == 0
        return False

    def _is_at_its_name(self) -> bool:
        """Whether the name still leads to the file that was locked; its holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.lstat())
        except FileNotFoundError:
            return False


def _lock(fd: int, *, shared: bool) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 1 << 20, os.SEEK_SET)  # such locks forbid reading: lock a byte far from the text
            if not shared:  # there are no shared ones: runs that share a folder are told apart from no other there
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            os.lseek(fd, 0, os.SEEK_SET)
            return False
        raise
    return True
