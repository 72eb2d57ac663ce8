"""Where an output may lie: names that every system takes, apart from its sources; and why a place cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from llava_convert.core.errors import OutputError, UsageError

_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_RESERVED |= {device + digit for device in ("COM", "LPT") for digit in "0123456789¹²³"}
NO_ROOM = "free some space or choose another place with -o"
_HINTS = {
    "ENOSPC": NO_ROOM,
    "EIO": "the disk, or the mount that it is on, fails: choose another place with -o",
    "ENOENT": "something removed it meanwhile: run it again, or choose another place with -o",
    "EMFILE": "raise the limit on open files: ulimit -n 65536",
    "EDQUOT": "your quota is used up: free some space or choose another place with -o",
    "EFBIG": "the file system or `ulimit -f` allows no file of that size: lower --max-shard-size or raise the limit",
    "EROFS": "the file system is read-only: choose another place with -o",
    "EACCES": "choose a place you may write to with -o",
    "EPERM": "choose a place you may write to with -o",
    "EBUSY": "it is a mount point or in use: choose another place with -o",
    "EXDEV": "OUT lies on another device than its folder: remove it yourself or choose another place with -o",
    "ENAMETOOLONG": "choose a shorter name with -o",
    "ENOTDIR": "a part of the path is a file: choose another place with -o",
}


def as_output_error(exc: OSError, path: Path) -> OutputError:
    """The OutputError for a system call that failed while writing `path`."""
    reason = exc.strerror or str(exc)
    hint = _HINTS.get(errno.errorcode.get(exc.errno or 0, ""), "choose another place with -o")
    return OutputError(f"{path} cannot be written: {reason}", hint=hint)


def free_bytes(out: Path) -> int | None:
    """What is free on the disk on which `out` is to lie; None where the system cannot tell."""
    there = next((folder for folder in out.absolute().parents if folder.is_dir()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


def check_name(name: str) -> None:
    """Raise OutputError unless `name` can be one part of a path on every system: outputs travel to other machines."""
    if name.split(".")[0].rstrip(" ").upper() in _RESERVED or name.endswith((".", " ")):
        raise OutputError(f"{name!r} cannot be a name on Windows", hint="choose another name")
    if sys.platform == "win32" and any(c in '<>:"|?*\\' for c in name):
        raise OutputError(f"{name!r} holds a character that Windows forbids", hint="choose another name")
    if len(os.fsencode(name)) > 255:
        raise OutputError(f"the name {name[:40]!r}… has {len(os.fsencode(name))} bytes; at most 255 are possible")


def place(out: Path) -> Path:
    """OUT as an absolute path whose folder is resolved; the last part stays as given (it may be a link)."""
    if "\0" in str(out):
        raise UsageError("the output's name holds a NUL character")
    if out.name in ("", ".", ".."):
        raise UsageError(f"{str(out)!r} does not name an output", hint="name a new folder with -o")
    check_name(out.name)
    if (size := len(os.fsencode(f".{out.name}.partial.lock"))) > 255:
        message = f"the output's name is {size - 255} bytes too long: {out.name[:40]!r}…"
        raise OutputError(message, hint=_HINTS["ENAMETOOLONG"])
    return _real(out.parent) / out.name


def refuse_overlap(places: list[Path], reads: Iterable[Path]) -> None:
    """Raise UsageError where writing to `places` could change one of `reads`: compared by name and by inode."""
    outs = {key for place in places for key in _keys(place)}
    around = {key for place in places for parent in _above(place) for key in _keys(parent)}
    mend = "name another place with -o"
    for read in reads:
        for part in (read.absolute(), _real(read)):
            if any(key in outs for folder in (part, *part.parents) for key in _keys(folder)):
                raise UsageError(f"the output {places[0]} is, or holds, the source {read}", hint=mend)
        if any(key in around for key in _keys(read)):
            raise UsageError(f"the output {places[0]} is inside the source {read}", hint=mend)
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed: nothing in it can be lost
        return
    if any(key in outs for folder in (here, *here.parents) for key in _keys(folder)):
        raise UsageError(f"the output {places[0]} holds the current folder", hint=mend)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve it takes a loop of links as it finds it


def _above(path: Path) -> set[Path]:
    return {*path.absolute().parents, *_real(path).parents}


def _keys(path: Path) -> Iterator[object]:
    yield path.absolute()
    yield _real(path)
    with contextlib.suppress(OSError):
        info = path.stat()
        if info.st_ino:
            yield (info.st_dev, info.st_ino)
