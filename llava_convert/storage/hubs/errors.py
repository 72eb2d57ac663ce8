"""Errors of the hubs' clients and of fsspec's stores, as one sentence and a hint, without tokens.

Each client raises its own library's errors, and the libraries changed with the versions (requests, httpx, httpx2). So
an error is judged by its HTTP status and by the names of its classes: one ordered table, the first row that fits.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava_convert.core.errors import HubError, unreadable
from llava_convert.core.retry import TransientError, retry_after
from llava_convert.core.values import dataclass
from llava_convert.storage.hubs.answers import bounded
from llava_convert.storage.hubs.log import Log, overheard
from llava_convert.storage.hubs.secrets import scrubbed

RERUN = "run the same command again: what has arrived is not sent twice"
_LATER = "run the same command again later"


@dataclass(frozen=True)
class Asked:
    """A question to a hub or a store, in the words of a sentence about its failure; `sends` is the folder sent."""

    where: str
    hub: str
    login: str
    revision: str = ""
    writing: bool = False
    sends: Path | None = None


@dataclass(frozen=True)
class Cause:
    """What is known of an error and of those that led to it."""

    names: frozenset[str]  # of all their classes, and of the bases of these
    outermost: frozenset[str]  # of the error's own class alone
    status: int | None
    detail: str
    wait: float | None  # as the server asks
    writing: bool


Fits = Callable[[Cause], bool]


@dataclass(frozen=True)
class Row:
    """When it fits, the sentence, the hint, and whether trying again may help."""

    fits: Fits
    sentence: str
    hint: str
    transient: bool = False


def _named(*names: str) -> Fits:
    return lambda cause: bool(cause.names & set(names))


def _status(*codes: int) -> Fits:
    return lambda cause: cause.status in codes


def _reading(fits: Fits) -> Fits:
    return lambda cause: not cause.writing and fits(cause)


def _writing(fits: Fits) -> Fits:
    return lambda cause: cause.writing and fits(cause)


_busy = _status(408, 425, 500, 502, 503, 504)
# Of httpx and httpx2, of requests and urllib3, of aiohttp, of modelscope_hub, of Python; and what a download by
# huggingface_hub raises for any trouble of the network.
_network = _named(
    *("TransportError", "ConnectionError", "Timeout", "TimeoutError", "NetworkError", "RequestTimeoutError"),
    *("ProtocolError", "ChunkedEncodingError", "gaierror", "SSLError", "ClientConnectionError", "ClientPayloadError"),
    "LocalEntryNotFoundError",
)
# Whatever else the libraries raise while bytes are read; of botocore, of aiohttp, of httpx.
_library = _named("OSError", "BotoCoreError", "ClientError", "HTTPError")
_no_json = _named("JSONDecodeError", "UnicodeDecodeError")
# The clients take an answer for what they expect: null, [] or {} in its place ends in one of these.
_NONSENSE = frozenset({"TypeError", "LookupError", "AttributeError"})

_SENSELESS = "the answer of {hub} makes no sense ({detail})"
_PORTAL = "check the network, where a proxy or a login page may answer instead; then run the same command again"
_BROKEN = "the connection failed ({detail})"
_FAILED = "{hub} answered with an error of its own ({status})"
_UNKNOWN_MODEL = "the model does not exist, or it is private and the token in use may not read it"
_NAME = "check the name; for a private model {login}"

_TABLE: tuple[Row, ...] = (
    Row(
        _writing(_named("OfflineModeIsEnabled")),
        "nothing was sent, since offline mode is on (HF_HUB_OFFLINE)",
        "set HF_HUB_OFFLINE=0",
    ),
    Row(
        _named("OfflineModeIsEnabled"),
        "offline mode is on (HF_HUB_OFFLINE), and the cache does not hold the model",
        "set HF_HUB_OFFLINE=0",
    ),
    Row(
        _reading(_named("GatedRepoError")),
        "access is given on request, and not to the token in use",
        "ask for access on the model's page, then {login}",
    ),
    Row(
        _named("NoCredentialsError", "ProfileNotFound"),
        "no credentials are set",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile by AWS_PROFILE",
    ),
    Row(
        _writing(_named("RevisionNotFoundError")),
        "the revision {revision} does not exist",
        "leave --revision out, or create the branch",
    ),
    Row(_named("RevisionNotFoundError"), "the revision {revision} does not exist", "check the name after @"),
    # The Hub answers 401 for a model that does not exist to who has no token.
    Row(_reading(_named("RepositoryNotFoundError", "NotExistError")), _UNKNOWN_MODEL, _NAME),
    Row(_writing(_status(401)), "{hub} does not accept the token (401)", "{login}; it needs the right to write"),
    Row(_status(401), "the token is missing or not valid (401)", "{login}"),
    Row(_named("LocalTokenNotFoundError", "AuthenticationError"), "{hub} asks for a token that it knows", "{login}"),
    Row(_named("QuotaExceededError"), "the account's storage is used up: {detail}", "make room, then " + RERUN),
    Row(_status(402), "the account's storage is used up: {detail}", "make room, then " + RERUN),
    Row(_writing(_status(403)), "the token may not write to it (403)", "{login}, by a token with the right to write"),
    Row(_status(403), "the token may not read it (403)", "{login}, by a token with the right to read"),
    Row(
        _writing(_status(404)),
        "the repository does not exist, or the token may not see it (404)",
        "check the name; {login}",
    ),
    Row(_status(404), "it does not exist (404)", "check the name"),
    Row(_writing(_status(409)), "it was changed at the same time (409)", RERUN),
    Row(_status(413), "{hub} takes no file so large (413): {detail}", "--max-shard-size makes smaller ones"),
    Row(_reading(_status(416)), "the file is shorter than the server said (416)", _LATER),
    Row(_writing(_status(429)), "there were too many requests (429)", f"later, {RERUN}", transient=True),
    Row(_status(429), "there were too many requests (429)", _LATER, transient=True),
    Row(_writing(_busy), _FAILED, f"later, {RERUN}", transient=True),
    Row(_busy, _FAILED, _LATER, transient=True),
    Row(lambda cause: (cause.status or 0) >= 500, _FAILED, _LATER),
    Row(
        _writing(lambda cause: cause.status is not None),
        "{hub} refused ({status}): {detail}",
        "llava-convert upload --help",
    ),
    Row(lambda cause: cause.status is not None, "{hub} refused ({status}): {detail}", "check the name"),
    Row(_named("HFValidationError"), "{detail}", "check the name"),
    Row(_named("AnswerError"), "{detail}", _PORTAL),
    Row(_no_json, _SENSELESS, _PORTAL),
    Row(_writing(_network), _BROKEN, RERUN, transient=True),
    Row(_network, _BROKEN, _LATER, transient=True),
    Row(lambda cause: bool(cause.outermost & _NONSENSE), _SENSELESS, _PORTAL),
    Row(_writing(lambda cause: True), "the upload failed ({detail})", RERUN),
    Row(_named("FileNotFoundError"), "it does not exist", "check the name"),
    Row(_named("PermissionError"), "access is denied ({detail})", "{login}"),
    Row(_library, _BROKEN, _LATER, transient=True),
    Row(lambda cause: True, "it cannot be read ({detail})", _LATER),
)

# What huggingface_hub says (`CommitOperationAdd`) where `os.path.isfile` is false, whatever the system said.
_NO_FILE = re.compile(r"Provided path: '(.+)' is not a file on the local file system")


@contextmanager
def asking(asked: Asked) -> Iterator[None]:
    """Turn what a client raises into HubError, or into TransientError where trying again may help.

    A file of the folder that is sent which the system does not let it read is no fault of the hub: InputError.

    The clients' log is kept off the terminal. With what was raised underneath it becomes a note of the error, which
    --verbose prints: a chained exception would be printed as it is, with whatever the server repeated.
    """
    with overheard(Log(every_thread=asked.writing)) as log:
        try:
            with bounded():
                yield
        except client_errors() as problem:
            _raise_unreadable(asked.sends, _chain(problem, *reversed(log.errors)))
            cause = _cause(problem, log.errors, asked.writing)
            row = next(row for row in _TABLE if row.fits(cause))
            words = vars(asked) | {"status": cause.status, "detail": cause.detail}
            reason, hint = scrubbed(row.sentence.format(**words)), row.hint.format(**words)
            if opened := next((m.group() for line in log.lines if (m := re.search(r"refs/pr/\d+", line))), None):
                hint = f"run it again with --revision {opened} instead of --create-pr, which would open another one"
            error: HubError | TransientError
            if row.transient:
                error = TransientError(reason, cause.wait, hint=hint)
            else:
                error = HubError(f"{asked.where}: {reason}", hint=hint)
            error.add_note(scrubbed("".join([*traceback.format_exception(problem), *log.lines])))
            raise error from None


def _raise_unreadable(folder: Path | None, chain: list[BaseException]) -> None:
    """Raises InputError where an error began at a file in `folder`. Sockets have no EIO: that is a disk's."""
    for error in chain if folder is not None else ():
        if (lost := _NO_FILE.search(str(error))) is not None:
            raise unreadable(lost[1], ValueError("the hub's client finds no file there")) from None
        if not isinstance(error, OSError):
            continue
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if name is not None and folder is not None and Path(name).absolute().is_relative_to(folder.absolute()):
            raise unreadable(name, error) from None
        if name is None and error.errno == errno.EIO:
            raise unreadable(folder, error) from None


# By module, the bases of what a client raises beside Python's own errors. A module that is not loaded raises nothing.
_LIBRARIES = {
    "modelscope_hub.errors": ("HubError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
}


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients raise: an error of the network, a refusal, and what an answer that makes no sense leads to."""
    found: list[type[Exception]] = [OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError]
    if (huggingface := sys.modules.get("huggingface_hub.errors")) is not None:
        # Its first base is the base of all errors of the HTTP library in use.
        found.append(huggingface.HfHubHTTPError.__bases__[0])
    for module, names in _LIBRARIES.items():
        if module in sys.modules:
            found.extend(getattr(sys.modules[module], name) for name in names)
    return tuple(found)


def no_such_call(problem: BaseException) -> bool:
    """Whether a server does not know the call at all, as a mirror of a part of a hub: the hubs themselves say why."""
    for error in _chain(problem):
        if _status_of(error) in (404, 405, 501):
            body, response = getattr(error, "response_body", None), getattr(error, "response", None)
            if body is None and response is not None:
                with suppress(ValueError):
                    body = response.json()
            explained = isinstance(body, dict) and {"error", "Code", "Message", "code", "message"} & body.keys()
            return not explained and "X-Error-Code" not in (getattr(response, "headers", None) or {})
    return False


def _cause(problem: BaseException, logged: list[BaseException], writing: bool) -> Cause:
    """An error by what led to it. ModelScope's client gives the reason of a failed file to its log alone."""
    chain = _chain(problem, *reversed(logged))
    statuses = [code for error in chain if (code := _status_of(error)) is not None]
    waits = [wait for error in chain if (wait := _wait_of(error)) is not None]
    return Cause(
        names=frozenset(base.__name__ for error in chain for base in type(error).__mro__),
        outermost=frozenset(base.__name__ for base in type(problem).__mro__),
        status=statuses[0] if statuses else None,
        detail=_line(chain),
        wait=waits[0] if waits else None,
        writing=writing,
    )


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
    """The HTTP status above 399 that an error is of: aiohttp calls it `status`, the others `status_code`."""
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status_code"), (error, "status")):
        code = getattr(holder, name, None)
        if isinstance(code, int) and code >= 400:
            return code
    # urllib3's last word after its own retries, which ModelScope's client passes on without the status.
    found = re.search(r"too many (\d{3}) error responses", str(error))
    return int(found.group(1)) if found else None


def _wait_of(error: BaseException) -> float | None:
    return retry_after(getattr(getattr(error, "response", None), "headers", None) or {})


def _line(chain: list[BaseException]) -> str:
    """The most telling first line: that of the error which all began with."""
    for error in reversed(chain):
        lines = str(getattr(error, "server_message", None) or error).strip().splitlines()
        if lines:
            return lines[0][:200]
    return type(chain[0]).__name__
