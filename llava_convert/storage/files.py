"""Checks of a file before it is trusted: it is regular, inside its folder, and not a stand-in for another."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from io import SEEK_END, RawIOBase
from pathlib import Path, PurePosixPath

from llava_convert.core.errors import MISSING, InputError, UnsafeError, unreadable
from llava_convert.core.text import printable
from llava_convert.storage.remote.files import RemoteStream
from llava_convert.storage.remote.mounts import remote_of

_READ_BYTES = 256 << 10

_LFS_STARTS = (b"version https://git-lfs.github.com/", b"version https://hawser.github.com/")
_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


def open_regular(path: Path) -> RawIOBase:
    """Opens `path` to read bytes, unbuffered, and never waits for another process. It may stand for a remote file.

    Raises InputError when it is missing, not readable, or no regular file (fault row 32). It is looked at before it
    is opened, since opening a device can act on it; and again afterwards, since it may have been exchanged. A FIFO
    opened for reading waits for a writer unless O_NONBLOCK is given (POSIX open(2)); on a regular file that flag does
    nothing.
    """
    remote = remote_of(path)
    if remote is not None:
        return RemoteStream(remote)
    # All three flags are absent on some system.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_regular(path, path.stat().st_mode)
        descriptor = os.open(path, flags)
        stream = open(descriptor, "rb", buffering=0)  # noqa: SIM115, PTH123 (handed to the caller; of a descriptor)
        try:
            _check_regular(path, os.fstat(descriptor).st_mode)
        except BaseException:
            stream.close()
            raise
    except FileNotFoundError as error:
        link = " (a link to a file that does not exist)" if path.is_symlink() else ""
        raise unreadable(path, error, MISSING + link) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from error
    return stream


def require_regular(path: Path) -> os.stat_result:
    """What the system knows of `path`. Raises InputError as `open_regular` does."""
    with open_regular(path) as stream:
        return path.stat() if isinstance(stream, RemoteStream) else os.fstat(stream.fileno())


def size_of(stream: RawIOBase) -> int:
    """The size of an opened file; the stream stands at its start afterwards."""
    size = stream.seek(0, SEEK_END)
    stream.seek(0)
    return size


def will_read(stream: RawIOBase, spans: Iterable[tuple[int, int]]) -> None:
    """Say which (offset, length) are read next: over the network they are then fetched side by side."""
    if isinstance(stream, RemoteStream):
        stream.file.prefetch(spans)


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a small file. Raises InputError where it cannot be read, or is larger than `limit` bytes."""
    with open_regular(path) as stream:
        data = read_fully(stream, limit + 1, path)
    if len(data) > limit:
        raise InputError(f"{printable(path)}: larger than {limit:,} bytes, more than any file of its kind")
    return data


def read_fully(stream: RawIOBase, count: int, path: Path) -> bytes:
    """`count` bytes from where `stream` stands, fewer at its end. Raises InputError where the disk fails.

    In pieces, so that a `count` which is only a limit allocates nothing; a raw stream may also return less than was
    asked (read(2)).
    """
    parts = bytearray()
    try:
        while len(parts) < count:
            part = stream.read(min(count - len(parts), _READ_BYTES))
            if not part:
                break
            parts += part
    except OSError as error:
        raise unreadable(path, error) from error
    return bytes(parts)


def reject_stand_in(path: Path, head: bytes) -> None:
    """Raises InputError when `head`, the first bytes of `path`, is what one gets in place of a file.

    That is: nothing at all, the pointer which Git LFS keeps in a checkout (git-lfs docs/spec.md), or the page that a
    server sent with its error (fault rows 1, 19, 20).
    """
    if not head:
        raise InputError(f"{printable(path)}: empty file", hint="copy or download it again")
    if head.startswith(_LFS_STARTS):
        raise InputError(
            f"{printable(path)}: this is a Git LFS pointer, not the file itself",
            hint="run `git lfs pull` in the repository it was cloned from",
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE_STARTS):
        raise InputError(
            f"{printable(path)}: looks like a web page, not the file itself",
            hint="download it again; a page in place of a file often means that a login or a token was missing",
        )


def require_inside(root: Path, name: str) -> Path:
    """`root / name`, for a relative `name` which stays in the folder `root` even through links.

    Raises UnsafeError for a link that leads elsewhere. One way out is allowed: a snapshot in a Hugging Face cache is
    made of links into the `blobs` folder of the same repository (huggingface_hub, "Understand caching"):
    `models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>`. Whether the file exists is not asked.
    """
    path = root / name
    try:
        home = root.resolve()
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise InputError(f"{printable(path)}: cannot be followed: {printable(error)}") from error
    if target.is_relative_to(home) or target.parent == _blobs(home):
        return path
    raise UnsafeError(
        f"{printable(path)}: is a link that leaves its folder, to {printable(target)}",
        hint="put the file itself in the place of the link, if you trust it and want it there",
    )


def relative_name(name: str) -> str | None:
    """`name` as a plain relative POSIX path, or None when it could mean a place outside the folder that names it.

    Refused on every system alike, so that a checkpoint does not turn dangerous when it is moved: absolute paths,
    `..`, backslashes (which make UNC paths and separators on Windows), drive letters, control characters, nothing.
    """
    pure = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":" and name[0].isalpha()
    if drive or "\\" in name or not name.isprintable() or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        return None
    return str(pure)


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
    raise InputError(f"{printable(path)}: is {kind} where a file is expected")


def _blobs(home: Path) -> Path | None:
    """The `blobs` folder next to the `snapshots` which the resolved folder `home` lies in."""
    for revision in (home, *home.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None
