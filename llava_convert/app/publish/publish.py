"""Publishing: a folder on a hub, whole and identical, or an error that says what to do.

Each hub's module (`storage.hubs`) offers the same few steps, made of its own client. How the steps are put together,
what is retried and what counts as done stands here alone:

    place (make the repository) ─► listing (what is there) ─► send (what is not) ─► listing again, compared

So nothing is called done on a client's word, and a rerun sends what the hub lacks and no more.
"""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llava_convert.core.errors import HubError, TransferInterrupted, UsageError
from llava_convert.core.hub_names import Address
from llava_convert.core.progress import Reporter, Silence, stage
from llava_convert.core.retry import FIRST_TRIES, patiently
from llava_convert.core.text import listed
from llava_convert.engine.report import Published
from llava_convert.storage.files import read_file
from llava_convert.storage.fingerprints import Digest
from llava_convert.storage.hubs import HUBS, Content, Destination, Hub, Parcel, Sent, hub
from llava_convert.storage.hubs.errors import RERUN, Asked, asking, client_errors, no_such_call

T = TypeVar("T")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SLOWER = 5.0  # the pauses before a hub is asked again: 1 and 2.5 seconds


def check(to: Destination) -> None:
    """Refuse what cannot be published, before anything is done for it: no network.

    Raises UsageError (exit 2) for a repository's name, an option or a client that is missing, HubError (exit 8) where
    no token is to be had.
    """
    if _REPO.fullmatch(to.repo) is None:
        raise UsageError(f"{to.repo}: a repository is named by its owner and its name", hint="for instance me/my-llava")
    for name in to.hubs:
        chosen = hub(name)
        chosen.require(to)
        if not chosen.token():
            raise HubError(f"there is no token for {chosen.TITLE} on this machine", hint=chosen.LOGIN)


def publish(parcel: Parcel, say: Reporter | None = None) -> tuple[Published, ...]:
    """Put a folder on each hub that it is for. Raises what `check` raises, and HubError (exit 8)."""
    check(parcel.to)
    parcel = replace(parcel, bars=bool(getattr(say, "shows_progress", False)))  # the command's output knows
    return tuple(_publish(name, parcel, say or Silence()) for name in parcel.to.hubs)


def _publish(name: str, parcel: Parcel, say: Reporter) -> Published:
    chosen, to = hub(name), parcel.to
    asked = Asked(
        str(Address(HUBS[name], to.repo, to.revision)),
        chosen.TITLE,
        chosen.LOGIN,
        to.revision or chosen.BRANCH,
        writing=True,
        sends=parcel.folder,
    )
    stage(say, f"asking {chosen.TITLE}")
    url = _ask(asked, lambda: chosen.place(to))
    revision = to.revision or chosen.BRANCH
    there = _listing(chosen, asked, to, revision)
    lacking = _lacking(parcel, there or {})
    sent = Sent(revision)
    if lacking:
        size = sum(parcel.files[path].state.size for path in lacking)
        stage(say, None)  # the client has bars of its own
        say.note(f"{chosen.TITLE}: {len(lacking)} of {len(parcel.files)} files to {to.repo}, {size:,} bytes")
        # A pull request would be opened anew by each attempt.
        tries = 1 if to.create_pr else chosen.TRIES
        sent = _ask(asked, lambda: _interruptible(lambda: chosen.send(parcel, lacking)), tries)
    elif to.create_pr:
        say.note(f"{chosen.TITLE}: {to.repo} has all of it, so there is no pull request to open")
    stage(say, f"asking {chosen.TITLE}")
    there = _listing(chosen, asked, to, sent.revision) if lacking else there
    left = _lacking(parcel, there) if there is not None else []
    if there is None:
        say.warn(f"{chosen.TITLE} lists no files there: that all have arrived is its client's word alone")
    if left:
        raise HubError(
            f"{chosen.TITLE} has {len(parcel.files) - len(left)} of the {len(parcel.files)} files in {to.repo} as they "
            f"are here; not, or not the same: {listed(left)}",
            hint=RERUN,
        )
    return Published(
        hub=name,
        repo=to.repo,
        url=sent.url or url,
        revision=sent.revision,
        commit=sent.commit,
        files=len(parcel.files),
        bytes=sum(one.state.size for one in parcel.files.values()),
        skipped=len(parcel.files) - len(lacking),
        compared=there is not None,
    )


def _ask(asked: Asked, action: Callable[[], T], tries: int = FIRST_TRIES) -> T:
    """Do it, again where the hub or the network fails in passing. Raises HubError.

    The clients repeat most of their requests themselves, but not those that create, list and commit.
    """

    def attempt() -> T:
        with warnings.catch_warnings(), asking(asked):
            warnings.simplefilter("ignore")  # the clients' are of no use here, and hold addresses
            return action()

    return patiently(asked.where, attempt, tries=tries, slower=_SLOWER)


def _listing(chosen: Hub, asked: Asked, to: Destination, revision: str) -> Mapping[str, Content] | None:
    """What is there; None where the server has no such call, though it takes uploads."""

    def ask() -> Mapping[str, Content] | None:
        try:
            return chosen.listing(to, revision)
        except client_errors() as problem:
            if not no_such_call(problem):
                raise
            return None

    return _ask(asked, ask)


def _interruptible(action: Callable[[], T]) -> T:
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


def _lacking(parcel: Parcel, there: Mapping[str, Content]) -> list[str]:
    """The files that a hub does not have as they are here."""
    return [path for path, mine in parcel.files.items() if not _same(parcel.folder / path, mine, there.get(path))]


def _same(path: Path, mine: Digest, theirs: Content | None) -> bool:
    if theirs is None or theirs.size != mine.state.size:
        return False
    if theirs.sha256 is not None:
        return theirs.sha256 == mine.sha256
    return theirs.git_sha1 is None or theirs.git_sha1 == git_sha1(read_file(path, mine.state.size))


def git_sha1(data: bytes) -> str:
    """The name that git gives to a file's content; hubs list the files so that are not in LFS, which are small."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
