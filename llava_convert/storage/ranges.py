"""Moving ranges of bytes between files: cloned, copied inside the kernel, or through a small buffer.

Nothing here uses a file's own position (except on systems without positional reads), so several threads may
share one descriptor. Errors of reading become `InputError`; errors of writing stay `OSError`, and
`storage.output.staging` turns those into `OutputError`.

Why these methods: measured on ext4, 1 GiB warm, copy and fsync together, by minimum of 9: `cp` + `sync` 0.74 s;
`copy_file_range` in 8 MiB pieces with early writeback 0.35; 128 KiB `preadv`/`pwrite` with early writeback 0.46;
256 KiB 1.16 (the buffer must stay in the cache); two threads gain nothing over one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llava_convert.core.errors import InputError, unreadable
from llava_convert.storage.remote.files import FIRST, RemoteFile
from llava_convert.storage.remote.mounts import remote_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

BLOCK = 4096  # offsets equal modulo this can share pages (copy_file_range) or blocks (clone)
BUFFER = 128 << 10
PIECE = 8 << 20  # between two steps of progress, and between two starts of writeback
REMOTE_PIECE = 4 << 20  # one request; eight threads hold one or two each
CLONE_PIECE = 1 << 30
CLONE_LEAST = 64 << 10  # below this the system call and the unaligned ends cost more than they save

_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_SYNC_FILE_RANGE_WRITE = 2
_RWF_DONTCACHE = 0x80  # linux/fs.h, since 6.14
_NO_SUCH_FLAG = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # trying another way cannot help

Refused = set[tuple[str, int, int]]  # (method, source device, target device) that were found not to work
_position = threading.Lock()
_local = threading.local()


def read_into(fd: int, offset: int, buffer: WriteableBuffer, *, where: object = None) -> None:
    """Fill `buffer` from `offset`.

    Raises InputError when the file ends first or cannot be read; `where` names it in the message.
    """
    view = _bytes_of(buffer)
    done = 0
    while done < len(view):
        try:
            got = _read(fd, view[done:], offset + done)
        except OSError as exc:
            raise unreadable(where or "the input", exc) from exc
        if got == 0:
            raise InputError(
                f"{where or 'the input'} was truncated while reading: expected {len(view)} bytes at offset {offset}, "
                f"the file ends after {done} of them",
                hint="it is incomplete, or another program changed it meanwhile; fetch it again",
            )
        done += got


def write_all(fd: int, offset: int, buffer: ReadableBuffer, *, keep: bool = True) -> None:
    """Write the whole of `buffer` at `offset`. Raises OSError.

    Without `keep` its pages leave the memory once they are on the disk, where the system can do that: a file that is
    large beside the memory would push out what others use, and each of its pages costs the kernel a new one.
    """
    view = _bytes_of(buffer)
    done = 0
    while done < len(view):
        piece = view[done : done + PIECE]
        put = (_write if keep else _write_unkept)(fd, piece, offset + done)
        if put == 0:
            raise OSError(errno.ENOSPC, "nothing could be written")
        start_writeback(fd, offset + done, put)
        done += put


def worth_keeping(nbytes: int) -> bool:
    """Whether files of so many bytes may stay in the page cache: a sixteenth of the memory at most.

    Who loads a small model next finds it in memory. A large one would push out what others use, and the kernel has to
    find a page for each of its pages: 4 GB of GGUF took 10 s in a virtual machine that had not used that memory before,
    and 4.4 s where each page was used again.
    """
    if sys.platform != "linux":
        return True
    return nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range to the disk now, so that the fsync at the end finds little to do.

    A hint: does nothing for short ranges or where the system has no such call.
    """
    if length >= PIECE // 8 and (call := _sync_file_range()) is not None:
        call(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def copy_range(
    src_fd: int,
    src_off: int,
    dst_fd: int,
    dst_off: int,
    length: int,
    *,
    progress: Callable[[int], None],
    where: object = None,
    refused: Refused | None = None,
    keep: bool = True,
) -> None:
    """Copy `length` bytes; `progress` gets the size of each piece that arrived, `keep` is as for `write_all`.

    Tries a clone, then `copy_file_range` (both only where the offsets agree modulo 4096), then a buffer. What does not
    work is added to `refused`, and what is in it is not tried. Raises InputError when the source ends first or cannot
    be read, OSError when the target cannot be written.
    """
    end = src_off + length
    shift = dst_off - src_off
    at = src_off
    refused = set() if refused is None else refused
    if shift % BLOCK == 0 and length > 0:
        pair = (_looked_at(src_fd, where).st_dev, os.fstat(dst_fd).st_dev)
        first, last = -(-at // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if last - first >= CLONE_LEAST and ("clone", *pair) not in refused:
            _through_buffer(src_fd, at, dst_fd, shift, first, progress, where, keep)
            at = _by_clone(src_fd, first, dst_fd, shift, last, progress, pair, refused)
        if end - at > BUFFER and ("kernel", *pair) not in refused:
            at = _in_kernel(src_fd, at, dst_fd, shift, end, progress, pair, refused)
    _through_buffer(src_fd, at, dst_fd, shift, end, progress, where, keep)


class FilePool:
    """Source files, each opened once and read by any number of threads; a context manager.

    A path may stand for a remote file (`storage.remote`): its bytes then come over the network, in pieces.
    """

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._mutex = threading.Lock()
        self._ahead = threading.local()
        self._stopped = threading.Event()
        self._refused: Refused = set()

    def stop(self) -> None:
        """Let threads that still fetch something give up after the piece that they are at: nobody wants it any more."""
        self._stopped.set()

    def read_into(self, path: Path, offset: int, buffer: WriteableBuffer, *, until: int = 0) -> None:
        """Fill `buffer` from byte `offset` of a file; the bytes up to `until` may be asked for next.

        Raises InputError when it is missing, unreadable, no regular file or ends first; HubError for a remote one.
        """
        remote = remote_of(path)
        if remote is None:
            read_into(self.open(path), offset, buffer, where=path)
        else:
            self._fetch(remote, offset, _bytes_of(buffer), until)

    def copy_to(
        self,
        path: Path,
        offset: int,
        dst_fd: int,
        dst_off: int,
        length: int,
        *,
        progress: Callable[[int], None],
        keep: bool = True,
    ) -> None:
        """Copy `length` bytes of a file into an open one, as `copy_range` does. Raises what `read_into` raises."""
        remote = remote_of(path)
        if remote is None:
            fd, refused = self.open(path), self._refused
            copy_range(fd, offset, dst_fd, dst_off, length, progress=progress, where=path, refused=refused, keep=keep)
            return
        for done in range(0, length, REMOTE_PIECE):
            if self._stopped.is_set():
                return
            piece = memoryview(bytearray(min(REMOTE_PIECE, length - done)))
            remote.fetch_into(offset + done, piece)
            write_all(dst_fd, dst_off + done, piece, keep=keep)
            progress(len(piece))

    def _fetch(self, remote: RemoteFile, offset: int, view: memoryview, until: int) -> None:
        """Small reads one after another are served of one piece, which each thread keeps for a few files.

        What is small as a whole (a tower has two hundred biases) is fetched with what lies behind it, for all threads.
        """
        windows = self._windows()
        while len(view):
            start, data = windows.get(id(remote), (0, b""))
            if not start <= offset < start + len(data):
                end = max(until, offset + len(view))
                if end - offset < FIRST:
                    start, data = remote.kept_around(offset, end)
                elif len(view) >= REMOTE_PIECE or offset + len(view) == end:  # nothing more to fetch along
                    remote.fetch_into(offset, view)
                    return
                else:
                    start, data = offset, remote.fetch(offset, min(offset + REMOTE_PIECE, end))
                    windows[id(remote)] = start, data
            part = memoryview(data)[offset - start : offset - start + len(view)]
            view[: len(part)] = part
            view, offset = view[len(part) :], offset + len(part)
            if offset == start + len(data) and windows.get(id(remote), (0, b""))[1] is data:
                del windows[id(remote)]  # used up: what follows comes next, and not of this piece

    def _windows(self) -> dict[int, tuple[int, bytes]]:
        found: dict[int, tuple[int, bytes]] | None = getattr(self._ahead, "windows", None)
        if found is None:
            found = self._ahead.windows = {}
        while len(found) > 2:  # a source and what it is compared with
            del found[next(iter(found))]
        return found

    def open(self, path: Path) -> int:
        """The descriptor of an ordinary file, valid until the pool is closed. Raises InputError as `read_into`."""
        with self._mutex:
            fd = self._fds.get(path)
            if fd is None:
                fd = self._fds[path] = _open_regular(path)
            return fd

    def close(self) -> None:
        with self._mutex:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> FilePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a FIFO must not hang; it means nothing for regular files.
    flags = os.O_RDONLY
    for name in ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    try:
        fd = os.open(path, flags)
    except OSError as exc:
        raise unreadable(path, exc, "cannot be opened") from exc
    try:
        regular = stat.S_ISREG(_looked_at(fd, path).st_mode)
    except InputError:
        os.close(fd)
        raise
    if not regular:
        os.close(fd)
        raise InputError(f"{path} is not a regular file")
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def _looked_at(fd: int, where: object) -> os.stat_result:
    """What the system knows of an open source. Raises InputError: an OSError would be taken for one of the target."""
    try:
        return os.fstat(fd)
    except OSError as exc:
        raise unreadable(where or "the input", exc) from exc


def read_back(fd: int, offset: int, length: int) -> bytearray:
    """What was written into an open file: `length` bytes from `offset` on, fewer at its end."""
    found = bytearray(length)
    done = 0
    while done < length and (got := _read(fd, memoryview(found)[done:], offset + done)):
        done += got
    return found[:done]


def _bytes_of(buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # a view with a zero in its shape refuses the cast


def _read(fd: int, view: memoryview, offset: int) -> int:
    view = view[:CLONE_PIECE]  # macOS refuses reads over 2 GiB
    if hasattr(os, "preadv"):
        got: int = os.preadv(fd, [view], offset)
        return got
    if hasattr(os, "pread"):
        data = os.pread(fd, min(len(view), PIECE), offset)
    else:
        with _position:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, min(len(view), PIECE))
    view[: len(data)] = data
    return len(data)


def _write(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        put: int = os.pwrite(fd, view, offset)
        return put
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def _write_unkept(fd: int, view: memoryview, offset: int) -> int:
    """The whole pages of `view` so that they leave the memory; what shares a page with other bytes as usual.

    The system would have to read such a page from the disk again to write its other part: 27 s for a model that else
    took 18 s.
    """
    head, whole = -offset % BLOCK, len(view) // BLOCK * BLOCK
    if head:
        return _write(fd, view[:head], offset)
    if whole and sys.platform == "linux" and hasattr(os, "RWF_DSYNC"):  # where Python was built with flags of writes
        try:
            return os.pwritev(fd, [view[:whole]], offset, _RWF_DONTCACHE)
        except OSError as exc:
            if exc.errno not in _NO_SUCH_FLAG:
                raise
    return _write(fd, view, offset)


def _through_buffer(
    src_fd: int, at: int, dst_fd: int, shift: int, end: int, progress: Callable[[int], None], where: object, keep: bool
) -> None:
    buffer: memoryview | None = getattr(_local, "buffer", None)
    if buffer is None:
        buffer = _local.buffer = memoryview(bytearray(BUFFER))
    while at < end:
        start, stop = at, min(at + PIECE, end)
        while at < stop:
            piece = buffer[: min(BUFFER, stop - at)]
            read_into(src_fd, at, piece, where=where)
            write_all(dst_fd, at + shift, piece, keep=keep)
            at += len(piece)
        start_writeback(dst_fd, start + shift, stop - start)
        progress(stop - start)


def _by_clone(
    src_fd: int,
    at: int,
    dst_fd: int,
    shift: int,
    end: int,
    progress: Callable[[int], None],
    pair: tuple[int, int],
    refused: Refused,
) -> int:
    """Share the blocks of `at`..`end` and return where it stopped; a refusal is added for the two devices."""
    while at < end:
        piece = min(CLONE_PIECE, end - at)
        try:
            _clone(src_fd, at, piece, dst_fd, at + shift)
        except OSError:
            refused.add(("clone", *pair))  # whatever it was, writing the bytes will tell
            break
        at += piece
        progress(piece)
    return at


def _clone(src_fd: int, src_off: int, length: int, dst_fd: int, dst_off: int) -> None:
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, "no FICLONERANGE here")
    import fcntl

    fcntl.ioctl(dst_fd, _FICLONERANGE, struct.pack("=qQQQ", src_fd, src_off, length, dst_off))


def _in_kernel(
    src_fd: int,
    at: int,
    dst_fd: int,
    shift: int,
    end: int,
    progress: Callable[[int], None],
    pair: tuple[int, int],
    refused: Refused,
) -> int:
    """Copy by `copy_file_range` and return where it stopped; the caller does the rest through a buffer."""
    if sys.platform != "linux" or not hasattr(os, "copy_file_range"):
        return at
    while at < end:
        try:
            moved = os.copy_file_range(src_fd, dst_fd, min(PIECE, end - at), at, at + shift)
        except OSError as exc:
            if exc.errno in _FULL:
                raise
            refused.add(("kernel", *pair))
            break
        if moved == 0:  # the source's end, or a file system that pretends: a read tells which
            break
        start_writeback(dst_fd, at + shift, moved)
        at += moved
        progress(moved)
    return at


@cache
def _sync_file_range() -> Any:
    if sys.platform != "linux":
        return None
    import ctypes  # only in a process that writes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
