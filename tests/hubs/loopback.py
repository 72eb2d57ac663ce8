"""What the hubs' doubles share: an HTTP server on this machine, its log, and faults on order.

A double speaks a hub's protocol to the hub's own client, so that tests need no network and can cut a transfer at any
request. Nothing here knows a hub: `answer` is theirs.
"""

from __future__ import annotations

import hashlib
import json
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

Blob = bytes | Path
CHUNK = 1 << 18


@dataclass(frozen=True)
class Request:
    """What a client asked. `raw` is as it came; `quoted` is without the query; `path` is that unquoted."""

    method: str
    raw: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def quoted(self) -> str:
        return urlsplit(self.raw).path

    @property
    def path(self) -> str:
        return unquote(self.quoted)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.raw).query))

    @property
    def host(self) -> str:
        return self.headers.get("Host", "")

    @property
    def token(self) -> str | None:
        """What the Authorization header carries."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Seen:
    """One line of the log."""

    method: str
    path: str
    query: dict[str, str]
    range: str | None
    authorized: bool
    host: str
    status: int = 0  # 0: dropped
    sent: int = 0  # bytes of the answer's body


@dataclass(frozen=True)
class Answer:
    """What to send. `ranged` bodies obey the request's Range header."""

    status: int = 200
    body: Blob = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    ranged: bool = False


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


# --- faults: what `hub.fault` returns


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer; with `after`, once the request has had its effect."""

    after: bool = False


@dataclass(frozen=True)
class Truncate:
    """Promise the whole body, send `count` bytes of it, and close the connection."""

    count: int


Fault = Status | Drop | Truncate
FaultHook = Callable[[int, Request], Fault | None]


def closed_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def size_of(blob: Blob) -> int:
    return len(blob) if isinstance(blob, bytes) else blob.stat().st_size


def read(blob: Blob) -> bytes:
    return blob if isinstance(blob, bytes) else blob.read_bytes()


def sha256(blob: Blob) -> str:
    if isinstance(blob, bytes):
        return hashlib.sha256(blob).hexdigest()
    state = blob.stat()
    return _sha256_of_file(blob, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1000)
def _sha256_of_file(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_sha1(data: bytes) -> str:
    """What git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def folder_files(folder: Path) -> dict[str, Blob]:
    """Every file under a folder, by its path there."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


class Loopback(ABC):
    """A server in threads, as a context manager. `requests` is its log; `fault` can break any request.

    `fault` is called with the request's number (from 0) and the request; it may also do something, such as to kill the
    client, before it returns.
    """

    def __init__(self) -> None:
        self.requests: list[Seen] = []
        self.fault: FaultHook = lambda n, request: None
        self._lock = threading.RLock()
        self._home = tempfile.TemporaryDirectory(prefix="hub-")
        self.home = Path(self._home.name)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    @property
    @abstractmethod
    def env(self) -> dict[str, str]:
        """The environment that makes the real client use this server."""

    @abstractmethod
    def answer(self, request: Request) -> Answer:
        """What a request gets, but for faults."""

    def forget(self) -> None:
        """Empty the log, so that requests are counted from 0 again."""
        with self._lock:
            self.requests.clear()

    def lines(self) -> list[str]:
        """The log in short: `POST /api/repos/create 200`."""
        return [f"{seen.method} {seen.path} {seen.status}" for seen in self.requests]

    def _log(self, request: Request) -> tuple[int, Seen]:
        seen = Seen(
            request.method,
            request.path,
            request.query,
            request.headers.get("Range"),
            "Authorization" in request.headers,
            request.host,
        )
        with self._lock:
            self.requests.append(seen)
            return len(self.requests) - 1, seen


def _handler(hub: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def serve(self) -> None:
            try:
                self._serve()
            except (BrokenPipeError, ConnectionResetError):  # the client went away: often that is the test
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

        def _serve(self) -> None:
            request = Request(self.command, self.path, self.headers, self._body())
            number, seen = hub._log(request)
            fault = hub.fault(number, request)
            if isinstance(fault, Drop) and not fault.after:
                return self._drop()
            if isinstance(fault, Status):
                answer = Answer(fault.code, fault.body, fault.headers)
            else:
                answer = hub.answer(request)
            if isinstance(fault, Drop):
                return self._drop()
            self._send(answer, seen, fault.count if isinstance(fault, Truncate) else None)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _drop(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _send(self, answer: Answer, seen: Seen, limit: int | None) -> None:
            total = size_of(answer.body)
            start, end, status, headers = 0, total, answer.status, dict(answer.headers)
            if answer.ranged:
                headers.setdefault("Accept-Ranges", "bytes")
                if seen.range is not None:
                    start, end = _span(seen.range, total)
                    status = 206 if start < end else 416
                    headers["Content-Range"] = (
                        f"bytes {start}-{end - 1}/{total}" if status == 206 else f"bytes */{total}"
                    )
            seen.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            left = end - start if limit is None else min(limit, end - start)
            for piece in _pieces(answer.body, start, left):
                self.wfile.write(piece)
                seen.sent += len(piece)
            if left < end - start:
                self.wfile.flush()
                self._drop()

    return Handler


def _span(text: str, total: int) -> tuple[int, int]:
    """`bytes=0-9`, `bytes=10-`, `bytes=-4` as start and end; (0, 0) where there is nothing to send."""
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, total - int(last)), total
    start, end = int(first), min(total, int(last) + 1) if last else total
    return (start, end) if start < end else (0, 0)


def _pieces(blob: Blob, start: int, count: int) -> Iterator[bytes]:
    if isinstance(blob, bytes):
        yield blob[start : start + count]
        return
    with blob.open("rb") as stream:
        stream.seek(start)
        while count > 0 and (piece := stream.read(min(CHUNK, count))):
            count -= len(piece)
            yield piece
