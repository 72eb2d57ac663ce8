"""Which files of an output are finished: a record in the staging folder, which a later run proves file by file.

The record is the plan's hash, then a line of JSON for each finished file: its name, its size, its proof, and what the
run found out about it. A file counts as finished once its line is there, and only while the proof holds. A run that has
the folder to itself keeps one record; each of several that share it keeps its own, and all of them are read as one.

The proof is the file's inode and times, of which the kernel changes one whenever somebody writes to the file. A digest
would have each output read once more: of one that is larger than memory, from the disk. Two have a digest all the same.
What several runs share may lie on a file system whose times mean little: there it is xxh3-128 where that is installed
(extra `digest`), else sha256, which takes a fifth of a conversion's time (2 GB renamed on two cores: 2.8 s without, 3.4
with sha256). And it is sha256 where somebody asks for that later, so that a file is hashed once. All of them are
against damage and mistakes: who may write to the folder could write the record, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, OutputError
from llava_convert.core.text import listed
from llava_convert.storage.files import relative_name
from llava_convert.storage.fingerprints import Digest, State, state_of
from llava_convert.storage.output.own_files import create_own, is_own, open_own
from llava_convert.storage.ranges import read_into

RECORD = ".llava-convert-plan"
# Longer than any: a line a shard.
MAX_RECORD_BYTES = 16 << 20
_STATE = "state"
# To hand a smaller file to the other thread would take longer than to hash it.
_AT_ONCE = 1 << 20
_BLOCK = 256 << 10


class OtherPlanError(Exception):
    """A staging folder holds files of another plan, or what is no record of ours; `str()` is the record's name."""


class FinishedFiles:
    """The record of one staging folder; `share` is what tells the records of several runs apart that share it.

    A large file is hashed, if at all, beside the writing of the next one: the disk does not wait for it. At most
    one file waits. What is not hashed when the output is complete need not be any more.
    """

    def __init__(self, folder: Path, plan_hash: str, share: str | None = None, *, sha256: bool = False) -> None:
        self._folder, self._plan_hash, self._share = folder, plan_hash, share
        self._proof = "sha256" if sha256 else _STATE if share is None else next(iter(_algorithms()))
        self._lines: dict[str, tuple[int, str]] = {}
        self._states: dict[str, State] = {}
        self.found: dict[str, Mapping[str, Any]] = {}
        self._fd = -1
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._hasher: ThreadPoolExecutor | None = None
        self._hashing: Future[None] | None = None

    def take_over(self, names: Callable[[str], bool] = lambda name: True) -> dict[str, int]:
        """Name and size of each file that runs of the same plan finished; `found` says what they found of each.

        Nothing is changed. No link is followed. `names` says which files to prove, all by default; the rest are left
        out. Raises OtherPlanError, and OSError for a record that cannot be read.
        """
        for name, (size, proof, found) in self._read().items():
            if names(name) and self._is_ours(name) and self._holds(name, size, proof):
                self._lines[name], self.found[name] = (size, proof), found
        return {name: size for name, (size, _) in self._lines.items()}

    def start(self) -> None:
        """Begin a record with what was taken over; a run that has the folder to itself removes everything else.

        The new record is whole before an old one goes: whoever is killed here has lost nothing.
        """
        name = RECORD if self._share is None else f"{RECORD}-{self._share}"
        path, begun = self._folder / name, self._folder / f"{name}.begun"
        with contextlib.suppress(FileNotFoundError):
            begun.unlink()
        self._fd = create_own(begun)
        os.write(self._fd, f"{self._plan_hash}\n".encode())
        if self._share is None:
            for finished, (size, proof) in self._lines.items():
                self._write(finished, size, proof)
        begun.replace(path)
        if self._share is None:
            self._remove_others()

    def add(self, name: str, size: int) -> None:
        """Note a file that is whole and durable."""
        if size <= _AT_ONCE or self._proof == _STATE:
            self._prove(name, size)
            return
        self.wait()
        self._hasher = self._hasher or ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashing = self._hasher.submit(self._prove, name, size)

    def tell(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep what was found out about a file beside its line, if need be in a further line."""
        with self._mutex:
            self.found[name] = found
            line = self._lines.get(name)
        if line is not None:
            self._write(name, *line)

    def wait(self) -> None:
        """Wait until each file that was added has its line. Raises what hashing raised."""
        if self._hashing is not None:
            self._hashing.result()

    def sha256(self) -> dict[str, Digest]:
        """The digests of the files that were hashed by sha256, each with what the file was then."""
        with self._mutex:
            found = {name: proof.partition(":") for name, (_, proof) in self._lines.items()}
        return {n: Digest(value, self._states[n]) for n, (how, _, value) in found.items() if how == "sha256"}

    def close(self) -> None:
        """Write no further line; the record itself stays. What is lost of it here is made anew by a resumed run."""
        self._closing.set()
        if self._hasher is not None:
            self._hasher.shutdown()
            self._hasher = None
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def _prove(self, name: str, size: int) -> None:
        value = self._value(name, size, self._proof)
        if value is not None:
            with self._mutex:
                self._lines[name] = (size, f"{self._proof}:{value}")
            self._write(name, *self._lines[name])

    def _holds(self, name: str, size: object, proof: object) -> bool:
        """Whether a file is as its line says; not where it cannot be read, or the algorithm is not installed here."""
        how, _, value = str(proof).partition(":")
        try:
            if how not in {_STATE, *_algorithms()} or (self._folder / name).stat().st_size != size:
                return False
            assert isinstance(size, int)
            return self._value(name, size, how) == value
        except (OSError, InputError):
            return False

    def _value(self, name: str, size: int, how: str) -> str | None:
        """What proves a file of this size, None where the record is closed meanwhile."""
        if how != _STATE:
            return self._digest(name, size, how)
        found = (self._folder / name).stat()
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_ctime_ns}"

    def _digest(self, name: str, size: int, algorithm: str) -> str | None:
        """The digest of a file of this size, None where the record is closed meanwhile."""
        digest = _algorithms()[algorithm]()
        buffer = memoryview(bytearray(_BLOCK))
        fd = os.open(self._folder / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            self._states[name] = state_of(os.fstat(fd))
            for at in range(0, size, _BLOCK):
                if self._closing.is_set():
                    return None
                block = buffer[: min(_BLOCK, size - at)]
                read_into(fd, at, block, where=self._folder / name)
                digest.update(block)
        finally:
            os.close(fd)
        return str(digest.hexdigest())

    def _write(self, name: str, size: int, proof: str) -> None:
        with self._mutex:
            if self._fd >= 0:
                os.write(self._fd, json.dumps([name, size, proof, self.found.get(name, {})]).encode() + b"\n")

    def _read(self) -> dict[str, tuple[Any, Any, Any]]:
        """What the records say, of those that were begun at all."""
        if not _is_own_folder(self._folder):
            raise OtherPlanError(self._folder.name)
        found: dict[str, tuple[Any, Any, Any]] = {}
        records = sorted(path for path in self._folder.iterdir() if is_record(path.name))
        for path in records:
            if not is_own(path):
                raise OtherPlanError(path.name)
            fd = open_own(path)
            try:
                data = os.read(fd, MAX_RECORD_BYTES)
            finally:
                os.close(fd)
            lines = data.split(b"\n")[:-1]  # the last is empty, or a torn line
            if not lines or lines[0] != self._plan_hash.encode():
                raise OtherPlanError(path.name)
            for line in lines[1:]:
                with contextlib.suppress(ValueError, TypeError):
                    name, size, proof, about = json.loads(line)
                    found[str(name)] = (size, proof, dict(about))
        if not records and self._share is None:
            raise OtherPlanError(self._folder.name)
        return found

    def _is_ours(self, name: str) -> bool:
        """Whether the file is one of ours, in folders that are none but ours on the way."""
        path = self._folder / name
        folders = [folder for folder in path.parents if folder.is_relative_to(self._folder)]
        return relative_name(name) == name and all(map(_is_own_folder, folders)) and is_own(path)

    def _remove_others(self) -> None:
        for folder, folders, files in os.walk(self._folder, topdown=False):  # it does not enter links
            for path in (Path(folder, name) for name in files):
                if path.relative_to(self._folder).as_posix() not in {RECORD, *self._lines}:
                    path.unlink()
            for path in (Path(folder, name) for name in folders):
                if path.is_symlink():
                    path.unlink()
                else:
                    with contextlib.suppress(OSError):  # it holds a finished file
                        path.rmdir()


def of_another_plan(place: str | Path) -> OutputError:
    """The error of a share that finds files of another plan where its own are to go."""
    return OutputError(
        f"{place} holds files of another plan: the source, its files' times, an option or the version differ",
        hint="give each share the same source and options; remove what is there to begin anew, or choose another -o",
    )


def refuse_missing(needs: Collection[str], finished: Collection[str]) -> None:
    """Raise OutputError where a file that is needed is not finished."""
    if missing := [name for name in needs if name not in finished]:
        raise OutputError(
            f"{len(missing)} of {len(needs)} files are not there yet: {listed(missing)}",
            hint="wait for their shares (--files I/N), or give --resume in place of --finish, which writes them here",
        )


def is_record(name: str) -> bool:
    """Whether a file of a staging folder is a record, by its name."""
    return name == RECORD or (name.startswith(f"{RECORD}-") and not name.endswith(".begun"))


@cache
def _algorithms() -> dict[str, Callable[[], Any]]:
    """What can be computed here, by name: the one to use comes first."""
    if find_spec("xxhash") is None:
        return {"sha256": hashlib.sha256}
    import xxhash

    return {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def _is_own_folder(path: Path) -> bool:
    """Whether a folder of this user's is there, not a link to one."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    mine = not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
    return stat.S_ISDIR(info.st_mode) and mine
