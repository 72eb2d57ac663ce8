"""Which files a source was: small fingerprints for `conversion.json`, and whether they stayed the same while read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from io import RawIOBase
from pathlib import Path

from llava_convert.core.errors import InputError, unreadable
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import open_regular, read_fully, require_regular, size_of
from llava_convert.storage.remote.mounts import mounted, remote_of
from llava_convert.storage.safetensors import MAX_HEADER_BYTES, SUFFIX

# A torch zip ends with its directory, about 100 bytes for each tensor, the CRC of its data among them (APPNOTE.TXT
# 4.3.12): this holds that of any usual model. Other formats show some weights at least. Neither end needs parsing.
END_BYTES = 1 << 20


def identity(files: Iterable[Path]) -> list[dict[str, str | int]]:
    """For each file its last name, its size and a sha256, without reading the weights.

    The sha256 is `of` the "header" of a safetensors file (its length field included), of the "ends" of any other file:
    the first and the last MiB, or the whole file where it is smaller than both. Two files of equal identity may differ
    in their weights; `--digest` is there for those. Raises InputError for a file that cannot be read.
    """
    found: list[dict[str, str | int]] = []
    for path in files:
        with open_regular(path) as stream:
            size = size_of(stream)
            header = path.suffix.lower() == SUFFIX
            digest = _header_digest(stream, path) if header else _ends_digest(stream, path, size)
        found.append({"file": path.name, "size": size, "sha256": digest, "of": "header" if header else "ends"})
    return found


@dataclass(frozen=True, slots=True)
class State:
    """What changes with a file's content: its times and its number here, what its server says of it elsewhere."""

    size: int
    mtime_ns: int = 0
    inode: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class Digest:
    """The sha256 of a whole file, which a hub's LFS calls it by, too; and what the file was when it was read."""

    sha256: str
    state: State

    def holds(self, path: Path) -> bool:
        """Whether the file there is the one that was read, and was not written since, by size, time and inode."""
        try:
            return _state(path) == self.state
        except InputError:
            return False

    def require(self, path: Path) -> None:
        """Raise InputError where the file does not hold any more."""
        if not self.holds(path):
            raise _changed(path, "it was written or exchanged")

    def as_json(self) -> dict[str, str | int]:
        return {"size": self.state.size, "sha256": self.sha256}


def digests(folder: Path, names: Iterable[str], known: Mapping[str, Digest] | None = None) -> dict[str, Digest]:
    """The digests of files by name; those that are `known` and still hold are not made again.

    Raises InputError for a file that cannot be read, or that changes while it is.
    """

    def one(name: str) -> Digest:
        path = folder / name
        if known is not None and name in known and known[name].holds(path):
            return known[name]
        with open_regular(path) as stream:
            before = state_of(os.fstat(stream.fileno()))
            try:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise unreadable(path, error) from error
            if state_of(os.fstat(stream.fileno())) != before or stream.tell() != before.size:
                raise _changed(path, "it was written")
        return Digest(sha256, before)

    ordered = sorted(names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as workers:  # hashing lets go of the interpreter's lock
        return dict(zip(ordered, workers.map(one, ordered), strict=True))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What `files` were when it was taken: take it when a source is opened, recheck it when all has been read.

    `small` are those that were read whole already, as they were before.
    """

    states: dict[Path, State]
    identity: list[dict[str, str | int]]
    small: dict[Path, State] = field(default_factory=dict)

    @classmethod
    def take(
        cls, files: Iterable[Path], before: Mapping[Path, State] | None = None, small: Iterable[Path] = ()
    ) -> Snapshot:
        """`before` is what some of the files were when the source was first looked at (`states_in`).

        Raises InputError for a file that cannot be read, or that changed since then.
        """
        first = before or {}
        states = {path: first[path] if path in first else _state(path) for path in files}
        snapshot = cls(states, identity(states), {path: first[path] for path in small if path in first})
        snapshot.recheck_states()
        return snapshot

    def recheck_states(self) -> None:
        """Raises InputError naming the first file whose size, time of change or inode is another (fault row 72)."""
        for path, before in {**self.states, **self.small}.items():
            now = _state(path)
            if now != before:
                what = "its size changed" if now.size != before.size else "it was written or exchanged"
                raise _changed(path, what)

    def recheck(self) -> None:
        """As `recheck_states`, and the headers too: a file system may keep times too coarse to tell."""
        self.recheck_states()
        for path, before, now in zip(self.states, self.identity, identity(self.states), strict=True):
            if before != now:
                raise _changed(path, "its header changed")


def states_in(folder: Path) -> dict[Path, State]:
    """What the files of a folder are now; of one that lies elsewhere nothing, since its server keeps the versions."""
    found: dict[Path, State] = {}
    if mounted(folder) is not None:
        return found
    with contextlib.suppress(OSError):  # what cannot be looked at cannot be read, and is told then
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                info = path.stat()
                if stat.S_ISREG(info.st_mode):
                    found[path] = state_of(info)
    return found


def _changed(path: Path, what: str) -> InputError:
    return InputError(
        f"{printable(path)}: changed while it was read: {what}",
        hint="wait until whatever writes it has finished, then run again",
    )


def _state(path: Path) -> State:
    remote = remote_of(path)
    if remote is not None:
        return State(remote.size, version=remote.version())
    return state_of(require_regular(path))


def state_of(info: os.stat_result) -> State:
    """What changes with a file's content, of what the system says of a file here."""
    return State(info.st_size, info.st_mtime_ns, info.st_ino)


def _header_digest(stream: RawIOBase, path: Path) -> str:
    field = read_fully(stream, 8, path)
    length = min(int.from_bytes(field, "little"), MAX_HEADER_BYTES)
    return hashlib.sha256(field + read_fully(stream, length, path)).hexdigest()


def _ends_digest(stream: RawIOBase, path: Path, size: int) -> str:
    digest = hashlib.sha256(read_fully(stream, END_BYTES, path))
    stream.seek(max(END_BYTES, size - END_BYTES))
    digest.update(read_fully(stream, END_BYTES, path))
    return digest.hexdigest()
