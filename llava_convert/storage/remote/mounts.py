"""Remote folders, mounted: files that lie elsewhere, read by ranges as if they lay here.

For each file of a remote folder there is a placeholder of the same name and size in a temporary folder. So whatever
asks what there is and how large it is asks the file system, as ever; whatever reads bytes goes through
`files.open_regular` or `ranges.FilePool`, and both ask `remote_of` first. Small files (configs, tokenizers) are fetched
whole when they are first opened, and are ordinary files from then on. Weights are never kept.

What a path stands for is asked of the path: there is no table of the process that two conversions would share.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

from llava_convert.storage.remote.files import Remote, RemoteFile

if sys.platform == "win32":
    from pathlib import WindowsPath as _Path
else:
    from pathlib import PosixPath as _Path


class Mount:
    """A temporary folder of placeholders for a remote one. Whoever makes it closes it."""

    root: Path

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote = remote
        self._files: dict[Path, RemoteFile] = {}
        self._fetching = threading.Lock()
        mounted_here = type("MountedPath", (MountedPath,), {"mount": self})
        self.root = mounted_here(Path(tempfile.mkdtemp(prefix="llava-convert-")).resolve() / name)
        self.root.mkdir()

    def place(self, name: str, size: int) -> None:
        """Let the file `name` stand for the remote one. Raises OSError, ValueError for a size that no file has."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(size)
        self._files[path] = RemoteFile(self.remote, name, size)

    def file(self, path: Path) -> RemoteFile | None:
        """The remote file that `path` stands for. A small one is fetched, and ordinary then."""
        file = self._files.get(path)
        if file is None or not file.small:
            return file
        with self._fetching:
            if path in self._files:
                path.write_bytes(file.fetch(0, file.size))
                del self._files[path]
        return None

    def close(self) -> None:
        """Take the placeholders away; their paths stand for nothing any more."""
        self._files.clear()
        shutil.rmtree(self.root.parent, ignore_errors=True)


class MountedPath(_Path):
    """A path that was made of a mount's root, and knows the mount.

    Each mount has a subclass of its own: a path that pathlib makes of another is of the other's class, and has nothing
    else of it (before Python 3.12). Such a path equals the plain one of the same text.
    """

    mount: ClassVar[Mount]


def remote_of(path: Path) -> RemoteFile | None:
    """The remote file that `path` stands for; None for an ordinary path. A small file is fetched, and ordinary then."""
    return path.mount.file(path) if isinstance(path, MountedPath) else None


def mounted(path: Path) -> Remote | None:
    """The remote folder that `path` is of, or None."""
    return path.mount.remote if isinstance(path, MountedPath) and path.is_relative_to(path.mount.root) else None


def address_of(path: Path) -> str | None:
    """The address of what `path` stands for, or None for what lies here."""
    remote = mounted(path)
    if remote is None:
        return None
    inside = path.relative_to(path.mount.root).as_posix()  # type: ignore[attr-defined]  # it is mounted
    return remote.address if inside == "." else f"{remote.address}/{inside}"
