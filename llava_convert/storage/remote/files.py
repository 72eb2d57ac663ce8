"""Files that lie elsewhere, read by ranges: what a server is asked, and what is kept of its answers."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from io import SEEK_CUR, SEEK_END, RawIOBase
from typing import TYPE_CHECKING

from llava_convert.core.errors import HubError, InputError
from llava_convert.core.retry import TransientError, patiently
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The header of a shard of an 8B model has 10 to 30 kB. Reads that go on double what they fetch, up to a piece, so that
# a header costs kilobytes and weights few requests.
FIRST = 64 << 10
PIECE = 8 << 20
KEPT = 4 << 20  # of what was read of a file's headers, for the next who opens it
SMALL = 64 << 20  # no config or tokenizer of a model is larger
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".distcp")


@dataclass
class Traffic:
    """How much was fetched: requests for bytes of files, and those bytes."""

    requests: int = 0
    bytes: int = 0

    def add(self, requests: int, count: int) -> None:
        with _counting:
            self.requests += requests
            self.bytes += count


_counting = threading.Lock()


@dataclass(frozen=True)
class Remote:
    """A folder elsewhere. `read` gives bytes `start` to `end` of a file and may give fewer; `version` what changes with
    its content (an ETag), asked anew. Both raise TransientError, and HubError for what stays wrong.

    `repo` is the hub's id of it, with the commit that `files` are of, where it lies on a hub. `sha256` is what the
    listing states of files, `ranged` gathers those of which parts were read.
    """

    address: str
    files: Mapping[str, int]
    read: Callable[[str, int, int], bytes]
    version: Callable[[str], str]
    repo: str | None = None
    commit: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    ranged: set[str] = field(default_factory=set, compare=False)


@dataclass
class RemoteFile:
    """One file of a remote folder. Threads may share it."""

    remote: Remote
    name: str
    size: int
    _kept: OrderedDict[int, bytes] = field(default_factory=OrderedDict, repr=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def address(self) -> str:
        return f"{self.remote.address}/{self.name}"

    @property
    def small(self) -> bool:
        return not self.name.lower().endswith(WEIGHTS) and self.size <= SMALL

    def version(self) -> str:
        return patiently(self.address, lambda: self.remote.version(self.name))

    def fetch_into(self, start: int, view: memoryview) -> None:
        """Fill `view` from byte `start`; what a broken answer lacks is asked for again, from where it broke.

        A file that is fetched whole is compared with the sha256 that the listing states. Raises HubError (exit 8),
        InputError where the file ends first.
        """
        if start + len(view) > self.size:
            raise InputError(f"{self.address} ends at {self.size:,} bytes, {start + len(view):,} are needed")
        done = 0
        while done < len(view):
            piece = view[done : done + PIECE]
            done += patiently(self.address, lambda at=start + done, piece=piece: self._once(at, piece))  # type: ignore[misc]
        if len(view) < self.size:
            self.remote.ranged.add(self.name)
        elif self.remote.sha256.get(self.name) not in (None, hashlib.sha256(view).hexdigest()):
            raise unlike_listing(self.address)

    def _once(self, start: int, view: memoryview) -> int:
        data = self.remote.read(self.name, start, start + len(view))
        self.remote.traffic.add(1, len(data))
        if len(data) > len(view):
            raise HubError(
                f"{self.address}: the server gives the whole file where a part was asked for",
                hint="download it, and name the local file",
            )
        if not data:
            raise TransientError("the answer was empty")
        view[: len(data)] = data
        return len(data)

    def fetch(self, start: int, end: int) -> bytes:
        data = bytearray(end - start)
        self.fetch_into(start, memoryview(data))
        return bytes(data)

    def prefetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Keep small (offset, length) that are read next, in any order: fetched side by side, neighbours together."""
        groups: list[tuple[int, int]] = []
        for start, end in sorted((at, min(at + length, self.size)) for at, length in spans if at < self.size):
            if groups and start - groups[-1][1] < FIRST // 8:
                groups[-1] = groups[-1][0], max(end, groups[-1][1])
            elif self.kept(start) is None:
                groups.append((start, end))
        if len(groups) < 2:
            return
        with ThreadPoolExecutor(8) as workers:
            for (start, _), data in zip(groups, workers.map(lambda span: self.fetch(*span), groups), strict=True):
                self.keep(start, data)

    def kept_around(self, start: int, end: int) -> tuple[int, bytes]:
        """A part that holds bytes `start` to `end`: one that was read before, else FIRST bytes from there on."""
        known = self.kept(start)
        if known is None or known[0] + len(known[1]) < end:
            known = start, self.fetch(start, max(end, min(self.size, start + FIRST)))
            self.keep(*known)
        return known

    def kept(self, at: int) -> tuple[int, bytes] | None:
        """A part of the file that was read before and holds byte `at`: where it starts, and its bytes."""
        with self._mutex:
            return next(((s, data) for s, data in self._kept.items() if s <= at < s + len(data)), None)

    def keep(self, start: int, data: bytes) -> None:
        with self._mutex:
            self._kept[start] = data
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > KEPT:
                self._kept.popitem(last=False)


def unlike_listing(address: str) -> HubError:
    return HubError(
        f"{address}: what the server sent is not what it lists: the sha256 is another",
        hint="run the same command again; if it stays so, do not use the model, and tell whoever published it",
    )


class RemoteStream(RawIOBase):
    """A remote file as a stream, for what reads headers: small windows at first, doubling while reads go on."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self._at = 0
        self._start, self._window, self._next = 0, b"", FIRST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {SEEK_CUR: self._at, SEEK_END: self.file.size}.get(whence, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.file.size - self._at)
        if wanted <= 0:
            return 0
        if not self._start <= self._at < self._start + len(self._window):
            self._move(wanted)
        skip = self._at - self._start
        part = self._window[skip : skip + wanted]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _move(self, wanted: int) -> None:
        known = self.file.kept(self._at)
        if known is None:
            goes_on = self._window and self._at == self._start + len(self._window)
            self._next = min(2 * self._next, PIECE) if goes_on else FIRST
            end = min(self.file.size, self._at + max(self._next, min(wanted, PIECE)))
            known = self._at, self.file.fetch(self._at, end)
            self.file.keep(*known)
        self._start, self._window = known
