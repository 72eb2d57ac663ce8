"""Remote folders, mounted: placeholders in a temporary folder, which `storage.remote` reads through."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_convert.core import addresses
from llava_convert.core.errors import HubError, UnsafeError
from llava_convert.core.text import printable
from llava_convert.storage.files import os_reason, relative_name
from llava_convert.storage.remote.files import Remote, RemoteFile, Traffic, forget, place

MOST_FILES = 100_000  # a dataset may have as many; a model has some dozens

_folders: dict[Path, Remote] = {}
_mutex = threading.Lock()
_running = 0


def mount(remote: Remote) -> Path:
    """A folder of placeholders for a remote one, under its last name, which outputs are named after.

    Raises UnsafeError where the name of a file would lead out of it, or where the listing would exhaust the machine;
    HubError where it makes no sense.
    """
    if len(remote.files) > MOST_FILES:
        raise UnsafeError(f"{remote.address}: {len(remote.files):,} files, more than any model has")
    name = remote.address.rstrip("/").rpartition("/")[2].partition("@")[0]
    root = Path(tempfile.mkdtemp(prefix="llava-convert-")).resolve() / name
    root.mkdir()
    _folders[root] = remote
    addresses.call(root, remote.address)
    for file, size in remote.files.items():
        plain = relative_name(file)
        if plain is None:
            raise UnsafeError(f"{remote.address}: {printable(file)} is no name for a file inside a folder")
        try:
            place(root / plain, RemoteFile(remote, plain, size))
        except (OSError, ValueError) as problem:  # a size that no file has; a file and a folder of one name
            raise HubError(
                f"{remote.address}: {printable(file)} of {size:,} bytes cannot be: {os_reason(problem)}"
            ) from problem
    return root


def mounted(path: Path) -> Remote | None:
    """The remote folder that `path` is of, or None."""
    return next((_folders[place] for place in (path, *path.parents) if place in _folders), None)


def unmount(root: Path) -> None:
    """Take the placeholders away; their paths stand for nothing any more."""
    _folders.pop(root, None)
    forget(root)
    addresses.forget(root)
    shutil.rmtree(root.parent, ignore_errors=True)


def fetched() -> Traffic:
    """What was fetched of everything that is mounted now."""
    found = Traffic()
    for remote in _folders.values():
        found.add(remote.traffic.requests, remote.traffic.bytes)
    return found


@contextmanager
def mounts() -> Iterator[None]:
    """What is mounted inside is unmounted at the end; of blocks inside each other, at the end of the outermost."""
    global _running
    with _mutex:
        _running += 1
    try:
        yield
    finally:
        with _mutex:
            _running -= 1
            last = _running == 0
        for root in list(_folders) if last else ():
            unmount(root)
