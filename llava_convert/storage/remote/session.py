"""What one job has opened: folders that lie elsewhere, what they are called, and what was read already.

`app` makes a session for a conversion (or an inspection, a verification, a release) and hands it down. Nothing of it is
known to the process, so that two jobs in two threads do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

from llava_convert.core.errors import ConvertError, HubError, UnsafeError, os_reason
from llava_convert.core.text import escaped, printable
from llava_convert.storage.files import relative_name
from llava_convert.storage.remote.files import Remote, Traffic
from llava_convert.storage.remote.memory import give_back
from llava_convert.storage.remote.mounts import Mount

MOST_FILES = 100_000  # a dataset may have as many; a model has some dozens

T = TypeVar("T")


class Session:
    """A context manager: at its end what it mounted is gone, and an error speaks of addresses."""

    def __init__(self) -> None:
        self._mounts: list[Mount] = []
        self._called: dict[str, str] = {}
        self._made: dict[Hashable, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(problem, ConvertError):
            problem.reword(self.called)
        for mount in self._mounts:
            mount.close()
        self._made.clear()

    def mount(self, remote: Remote) -> Mount:
        """A folder of placeholders for a remote one, under its last name, which outputs are named after.

        Raises UnsafeError where the name of a file would lead out of it, or where the listing would exhaust the
        machine; HubError where it makes no sense.
        """
        if len(remote.files) > MOST_FILES:
            raise UnsafeError(f"{remote.address}: {len(remote.files):,} files, more than any model has")
        give_back()
        mount = Mount(remote, remote.address.rstrip("/").rpartition("/")[2].partition("@")[0])
        self._mounts.append(mount)
        self.call(mount.root, remote.address)
        for file, size in remote.files.items():
            plain = relative_name(file)
            if plain is None:
                raise UnsafeError(f"{remote.address}: {printable(file)} is not a name for a file inside a folder")
            try:
                mount.place(plain, size)
            except (OSError, ValueError) as problem:  # a size that no file has; a file and a folder of one name
                raise HubError(
                    f"{remote.address}: {printable(file)} of {size:,} bytes cannot be: {os_reason(problem)}"
                ) from problem
        return mount

    def call(self, folder: Path, address: str) -> None:
        """From now on messages say `address` for `folder`."""
        self._called[str(folder)] = escaped(address)

    def called(self, text: object) -> str:
        """A path, or a text that holds paths, with every folder that was reached by an address called by it."""
        said = str(text)
        for folder, address in self._called.items():
            said = said.replace(folder, address)
        return said

    def address_of(self, path: Path) -> Path | str:
        """A path, or the address by which it was reached."""
        said = self.called(path)
        return path if said == str(path) else said

    def name_of(self, path: Path) -> str:
        """The last part of what a path is called, without a hub's revision."""
        address = self.called(path)
        if address == str(path):
            return path.name or path.absolute().name
        return PurePosixPath(address).name.partition("@")[0]

    @property
    def fetched(self) -> Traffic:
        """What was fetched of all that was mounted."""
        found = Traffic()
        for mount in self._mounts:
            found.add(mount.remote.traffic.requests, mount.remote.traffic.bytes)
        return found

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The files of which parts were read, so that the sha256 which a listing states of them was not compared."""
        remotes = [mount.remote for mount in self._mounts]
        return tuple(f"{one.address}/{name}" for one in remotes for name in sorted(one.ranged & one.sha256.keys()))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, which is called when it is first asked for; kept to the session's end."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found
