"""What the hubs' clients raise, as one sentence and what mends it; and the log and the token kept out of it.

Each client raises its own library's errors, and the libraries changed with the versions (requests, httpx, httpx2), so
an error is judged by its HTTP status and the names of its classes: one ordered table, the first row that fits.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from llava_convert.core import retry as patience
from llava_convert.core.errors import HubError, TransferInterrupted

if TYPE_CHECKING:
    from llava_convert.app.publish.publish import Destination, Hub

T = TypeVar("T")

RERUN = "run the same command again: what has arrived is not sent twice"
_LATER = f"later, {RERUN}"


@dataclass(frozen=True)
class Cause:
    """What is known of an error and of those that led to it."""

    names: frozenset[str]
    status: int | None
    detail: str
    wait: float | None = None  # as the server asks

    @property
    def network(self) -> bool:
        return self.status is None and bool(self.names & _NETWORK)

    @property
    def transient(self) -> bool:
        return self.network or self.status in (408, 429, 500, 502, 503, 504)


# Of httpx and httpx2, of requests and urllib3, of modelscope_hub, of Python. A class's name and those of its bases.
_NETWORK = frozenset(
    {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "NetworkError", "RequestTimeoutError"}
    | {"ProtocolError", "ChunkedEncodingError", "gaierror", "SSLError"}
)


def _named(*names: str) -> Callable[[Cause], bool]:
    return lambda cause: bool(cause.names & set(names))


def _status(*codes: int) -> Callable[[Cause], bool]:
    return lambda cause: cause.status in codes


# When it fits, the sentence, what mends it.
_TABLE: tuple[tuple[Callable[[Cause], bool], str, str], ...] = (
    (_named("OfflineModeIsEnabled"), "{hub} was not asked: HF_HUB_OFFLINE is set", "set HF_HUB_OFFLINE=0"),
    (_status(401), "{hub} does not accept the token of this machine", "{login}; it needs the right to write"),
    (_named("LocalTokenNotFoundError", "AuthenticationError"), "{hub} asks for a token that it knows", "{login}"),
    (_named("QuotaExceededError"), "the account's room on {hub} is used up: {detail}", "make room, then " + RERUN),
    (_status(402), "the account's room on {hub} is used up: {detail}", "make room, then " + RERUN),
    (_status(403), "the token may not write to {repo} on {hub}", "{login}, by one with the right to write there"),
    (_named("RevisionNotFoundError"), "{repo} on {hub} has no revision {revision}", "leave --revision out, or make it"),
    (_status(404), "{hub} finds no {repo}, or hides it from this token", "is the name right? {login}"),
    (_status(409), "{hub} refuses since {repo} was changed at the same time", RERUN),
    (_status(413), "{hub} takes no file so large: {detail}", "--max-shard-size makes smaller ones"),
    (_status(429), "{hub} asks to be left alone for a while (too many requests)", _LATER),
    (lambda cause: (cause.status or 0) >= 500, "{hub} has a fault of its own ({status})", _LATER),
    (lambda cause: cause.status is not None, "{hub} refused ({status}): {detail}", "llava-convert upload --help"),
    (lambda cause: cause.network, "{hub} cannot be reached, or the connection broke ({detail})", RERUN),
    (lambda cause: True, "{hub}: the upload failed ({detail})", RERUN),
)


@contextmanager
def told(hub: Hub, to: Destination) -> Iterator[None]:
    """Turn what the client raises into HubError, say nothing of its log, and let no token through."""
    with _overheard() as log:
        try:
            yield
        except client_errors() as problem:
            cause = _cause(problem, log.errors)
            words = {
                "hub": hub.TITLE,
                "login": hub.LOGIN,
                "repo": to.repo,
                "revision": to.revision or hub.BRANCH,
                "status": cause.status,
                "detail": cause.detail,
            }
            sentence, hint = next((s, h) for fits, s, h in _TABLE if fits(cause))
            opened = next((m.group() for line in log.lines if (m := re.search(r"refs/pr/\d+", line))), None)
            if opened:
                hint = f"run it again with --revision {opened} instead of --create-pr, which would open another one"
            error = HubError(scrubbed(sentence.format(**words)), hint=hint.format(**words))
            # For --verbose: what was raised and logged underneath, which a chained exception would print as it is.
            error.add_note(scrubbed("".join([*traceback.format_exception(problem), *log.lines])))
            raise error from None


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients raise. An answer that is no JSON is a ValueError, one that lacks a field a KeyError."""
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is the base of all errors of the HTTP library in use.
    found: list[type[Exception]] = [HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError, KeyError]
    with suppress(ImportError):
        from modelscope_hub.errors import HubError as ModelScopeError

        found.append(ModelScopeError)
    return tuple(found)


def no_such_call(problem: BaseException) -> bool:
    """Whether a server does not know what it was asked at all, as mirrors of a part of a hub: the hubs say why not."""
    for error in _chain(problem):
        if _status_of(error) in (404, 405, 501):
            body, response = getattr(error, "response_body", None), getattr(error, "response", None)
            if body is None and response is not None:
                with suppress(ValueError):
                    body = response.json()
            told = isinstance(body, dict) and {"error", "Code", "Message", "code", "message"} & body.keys()
            return not told and "X-Error-Code" not in (getattr(response, "headers", None) or {})
    return False


def patiently(action: Callable[[], T], tries: int = 3) -> T:
    """Do it; again after 1 and 2 seconds where the hub or the network fails in passing.

    The clients do so for most of their requests, but not for those that create, list and commit.
    """

    def pause(problem: Exception, number: int) -> float | None:
        cause = _cause(problem, [])
        if not cause.transient:
            return None
        return cause.wait if cause.wait is not None else 2.0 ** (number - 1)

    return patience.patiently(action, client_errors(), pause, tries=tries)


def interruptible(action: Callable[[], T]) -> T:
    """Do it so that Ctrl-C ends it at once: the clients send in threads, and wait for them before they raise it."""
    ended: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            ended.append(action())
        except BaseException as problem:  # raised again below, whatever it is
            failed.append(problem)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt as stop:
        raise TransferInterrupted(f"interrupted; {RERUN}") from stop
    if failed:
        raise failed[0]
    return ended[0]


def _cause(problem: BaseException, logged: list[BaseException]) -> Cause:
    """An error by what is behind it. ModelScope's client tells the reason of a failed file to its log alone."""
    chain = _chain(problem, *reversed(logged))
    statuses = [code for error in chain if (code := _status_of(error)) is not None]
    names = frozenset(base.__name__ for error in chain for base in type(error).__mro__)
    waits = [w for error in chain if (w := _wait_of(error)) is not None]
    return Cause(names, statuses[0] if statuses else None, _line(chain), waits[0] if waits else None)


def _chain(*problems: BaseException) -> list[BaseException]:
    """Errors and those that led to them."""
    chain: list[BaseException] = []
    for start in problems:
        step: BaseException | None = start
        while step is not None and step not in chain and len(chain) < 20:
            chain.append(step)
            step = step.__cause__ or step.__context__
    return chain


def _status_of(error: BaseException) -> int | None:
    for holder in (getattr(error, "response", None), error):
        code = getattr(holder, "status_code", None)
        if isinstance(code, int):
            return code
    # urllib3's last word after its own retries, which ModelScope's client passes on without the status.
    found = re.search(r"too many (\d{3}) error responses", str(error))
    return int(found.group(1)) if found else None


def _wait_of(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() else None


def _line(chain: list[BaseException]) -> str:
    """The most telling first line: that of the error which all began with."""
    for error in reversed(chain):
        lines = str(getattr(error, "server_message", None) or error).strip().splitlines()
        if lines:
            return lines[0][:200]
    return type(chain[0]).__name__


# --- the token and the log


def scrubbed(text: str) -> str:
    """A text without tokens, and without the query of an address, which of a signed one is a key."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = re.sub(r"\b(hf_[A-Za-z0-9]{6,}|ms-[0-9A-Za-z-]{8,})", "***", text)
    text = re.sub(r"(?i)(bearer|m_session_id=)\s*[^\s'\",;]+", r"\1 ***", text)
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\")]+", r"\1?…", text)


def _secrets() -> list[str]:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_SDK_TOKEN")
    found = [os.environ.get(name) for name in names]
    from llava_convert.app.publish.publish import HUBS, hub

    for name in HUBS:
        with suppress(ImportError):
            found.append(hub(name).token())
    return [secret for secret in found if secret]


@dataclass(eq=False)
class _Log(logging.Handler):
    """What the clients logged: lines, and the errors among what was to be filled in."""

    lines: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}\n")
        args = record.args if isinstance(record.args, tuple) else ()
        self.errors.extend(arg for arg in args if isinstance(arg, BaseException))


@contextmanager
def _overheard() -> Iterator[_Log]:
    """Take the clients' log and warnings away from the terminal: they hold signed addresses."""
    log = _Log()
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "modelscope_hub", "modelscope")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [log], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield log
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
