"""Bounds on the answers that the hubs' clients read: not compressed, and no text longer than any hub's.

The clients take an answer whole, and undo its compression before anybody can look: 600 kB can become 600 MB. So they
ask for none here, and an answer that is compressed all the same is refused by its header. The clients offer no setting
for that, so it hangs on the libraries that they send by (requests, httpx and httpx2), while one of our questions runs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

MOST = 32 << 20  # bytes of an answer that is no file: parsed it takes several times that; 1,000 files take 300 kB
_PLAIN = ("", "identity")


class AnswerError(RuntimeError):
    """An answer that could exhaust the memory."""


def require_plain(encoding: str | None) -> None:
    """Raise AnswerError where an answer's Content-Encoding is one."""
    if (encoding or "").strip().lower() not in _PLAIN:
        raise AnswerError("the answer is compressed, which was not asked for: unpacked it could fill the memory")


def too_long() -> AnswerError:
    return AnswerError(f"the answer is longer than {MOST >> 20} MB, more than any of its kind")


class _Count:
    """Bytes of one body so far."""

    def __init__(self) -> None:
        self.seen = 0

    def add(self, piece: bytes) -> bytes:
        self.seen += len(piece)
        if self.seen > MOST:
            raise too_long()
        return piece


def _is_file(target: str, status: int) -> bool:
    """Whether an answer to a path with its query is a file, which the clients write to the disk as it comes.

    Neither is the body of an error or of a redirection. ModelScope gives files at `/api/v1/…/repo?FilePath=…`.
    """
    return 200 <= status < 300 and ("/api/" not in target or "FilePath=" in target)


class _Bounds:
    """What hangs on the libraries while anybody asks: they are the process's."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.asking = 0
        self.undo = ExitStack()

    def hang(self) -> None:
        """On the classes: the clients make a new session where one has failed."""
        if (requests := sys.modules.get("requests")) is not None:
            self.replace(requests.Session, _by_requests)
        for name in ("httpx", "httpx2"):
            if (library := sys.modules.get(name)) is not None:
                self.replace(library.Client, _by_httpx)

    def replace(self, session: Any, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        plain = session.send
        session.send = made(plain)
        self.undo.callback(setattr, session, "send", plain)


_bounds = _Bounds()


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the answers that the clients get meanwhile, in any thread."""
    with _bounds.mutex:
        if not _bounds.asking:
            _bounds.hang()
        _bounds.asking += 1
    try:
        yield
    finally:
        with _bounds.mutex:
            _bounds.asking -= 1
            if not _bounds.asking:
                _bounds.undo.close()


# -- httpx and httpx2: hooks, which see redirects, too, and before a byte of a body is read


def _by_httpx(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def send(client: Any, request: Any, **options: Any) -> Any:
        hooks = client.event_hooks
        if _check not in hooks["response"]:  # they stay, and do nothing once nobody asks
            client.event_hooks = {
                "request": [*hooks["request"], _ask_plain],
                "response": [_check, *hooks["response"]],
            }
        return plain(client, request, **options)

    return send


def _ask_plain(request: Any) -> None:
    if _bounds.asking:
        request.headers["Accept-Encoding"] = "identity"


def _check(response: Any) -> None:
    if not _bounds.asking:
        return
    require_plain(response.headers.get("Content-Encoding"))
    if not _is_file(response.request.url.raw_path.decode("ascii"), response.status_code):
        response.stream = _counting(response.stream)


def _counting(stream: Any) -> Any:
    """A stream as the library has it, which is an instance of its SyncByteStream."""
    library: Any = sys.modules[type(stream).__module__.partition(".")[0]]

    class Counted(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            yield from map(_Count().add, stream)

        def close(self) -> None:
            stream.close()

    return Counted()


# -- requests: a hook of each request


def _by_requests(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def send(session: Any, request: Any, **options: Any) -> Any:
        request.headers["Accept-Encoding"] = "identity"
        request.register_hook("response", _checked)
        return plain(session, request, **options)

    return send


def _checked(response: Any, **options: Any) -> None:
    """Called before a byte of the body is read."""
    require_plain(response.headers.get("Content-Encoding"))
    if not _is_file(response.request.path_url, response.status_code):
        # `stream` and what iterates call one of these, each other they do not.
        raw, count = response.raw, _Count()
        for name in ("read", "read1"):
            if (plain := getattr(raw, name, None)) is not None:
                setattr(raw, name, _counting_calls(plain, count))
        pieces = raw.read_chunked
        raw.read_chunked = lambda *args, **more: map(count.add, pieces(*args, **more))


def _counting_calls(plain: Callable[..., bytes], count: _Count) -> Callable[..., bytes]:
    return lambda *args, **more: count.add(plain(*args, **more))
