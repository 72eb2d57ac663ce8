"""Publishing: a folder on a hub, whole and identical, or an error that says what to do.

A hub is a module here and a row of HUBS. Each offers the same few steps, made of its own client; what the steps are
put together to, what is retried and what counts as done stands in `publish` alone:

    place (make the repository) ─► listing (what is there) ─► send (what is not) ─► listing again, compared

So nothing is called done on a client's word, and a rerun sends what the hub lacks and no more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from llava_convert.app.publish.problems import RERUN, client_errors, interruptible, no_such_call, patiently, told
from llava_convert.core.errors import HubError, UsageError
from llava_convert.core.progress import Say, Silence
from llava_convert.core.text import listed
from llava_convert.engine.report import Published

HUGGINGFACE, MODELSCOPE, BOTH = "huggingface", "modelscope", "both"
# By the name that --hub takes: the module that knows it. `both` is every row.
HUBS: Mapping[str, str] = {
    HUGGINGFACE: "llava_convert.app.publish.huggingface",
    MODELSCOPE: "llava_convert.app.publish.modelscope",
}
MESSAGE = "Upload by llava-convert"

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Destination:
    """Where a folder goes, and how."""

    repo: str
    hubs: tuple[str, ...] = (HUGGINGFACE,)
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = MESSAGE

    @property
    def address(self) -> str:
        """What a card names: the id on the Hugging Face Hub where it goes there, which most readers know."""
        return self.repo if HUGGINGFACE in self.hubs else f"ms://{self.repo}"


@dataclass(frozen=True)
class Content:
    """What a file is by. A hub tells sha256, or git's sha1 of the blob, or neither."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Parcel:
    """A folder and what of it is published: by path, size and sha256."""

    folder: Path
    files: Mapping[str, Content]
    to: Destination
    bars: bool = False  # the clients may draw theirs


@dataclass(frozen=True)
class Sent:
    """What a client made of an upload."""

    revision: str
    commit: str | None = None
    url: str | None = None


class Hub(Protocol):
    """A hub's module. All but `require` and `token` use the network, and raise what the client raises."""

    TITLE: str
    BRANCH: str  # the one that a repository starts with
    LOGIN: str  # what gives its client a token
    TRIES: int  # of `send`, by how much its client repeats by itself

    def require(self, to: Destination) -> None:
        """Raises UsageError where the client is not installed, or cannot do what is asked."""

    def token(self) -> str | None: ...

    def place(self, to: Destination) -> str:
        """Make repository and branch where they are not there; returns the repository's address."""
        ...

    def listing(self, to: Destination, revision: str) -> dict[str, Content]: ...

    def send(self, parcel: Parcel, names: Collection[str]) -> Sent: ...


def hub(name: str) -> Hub:
    return cast(Hub, import_module(HUBS[name]))


def named_hubs(word: str) -> tuple[str, ...]:
    """The hubs that `--hub` means. Raises UsageError."""
    if word == BOTH:
        return tuple(HUBS)
    if word not in HUBS:
        raise UsageError(f"--hub {word}: it is one of {', '.join(HUBS)}, {BOTH}")
    return (word,)


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


def publish(parcel: Parcel, say: Say | None = None) -> tuple[Published, ...]:
    """Put a folder on each hub that it is for. Raises what `check` raises, and HubError (exit 8)."""
    check(parcel.to)
    parcel = replace(parcel, bars=bool(getattr(say, "shows_progress", False)))  # the command's output knows
    return tuple(_publish(name, parcel, say or Silence()) for name in parcel.to.hubs)


def _publish(name: str, parcel: Parcel, say: Say) -> Published:
    chosen, to = hub(name), parcel.to
    with told(chosen, to):
        url = patiently(lambda: chosen.place(to))
        revision = to.revision or chosen.BRANCH
        there = _listing(chosen, to, revision)
        lacking = _lacking(parcel, there or {})
        sent = Sent(revision)
        if lacking:
            size = sum(parcel.files[path].size for path in lacking)
            say.note(f"{chosen.TITLE}: {len(lacking)} of {len(parcel.files)} files to {to.repo}, {size:,} bytes")
            # A pull request would be opened anew by each attempt.
            sent = patiently(
                lambda: interruptible(lambda: chosen.send(parcel, lacking)), 1 if to.create_pr else chosen.TRIES
            )
        elif to.create_pr:
            say.note(f"{chosen.TITLE}: {to.repo} has all of it, so there is no pull request to open")
        there = _listing(chosen, to, sent.revision) if lacking else there
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
        bytes=sum(content.size for content in parcel.files.values()),
        skipped=len(parcel.files) - len(lacking),
        compared=there is not None,
    )


def _listing(chosen: Hub, to: Destination, revision: str) -> Mapping[str, Content] | None:
    """What is there; None where the server has no such call, though it takes uploads."""
    try:
        return patiently(lambda: chosen.listing(to, revision))
    except client_errors() as problem:
        if not no_such_call(problem):
            raise
        return None


def _lacking(parcel: Parcel, there: Mapping[str, Content]) -> list[str]:
    """The files that a hub does not have as they are here."""
    return [path for path, mine in parcel.files.items() if not _same(parcel.folder / path, mine, there.get(path))]


def _same(path: Path, mine: Content, theirs: Content | None) -> bool:
    if theirs is None or theirs.size != mine.size:
        return False
    if theirs.sha256 is not None:
        return theirs.sha256 == mine.sha256
    return theirs.git_sha1 is None or theirs.git_sha1 == git_sha1(path)


def git_sha1(path: Path) -> str:
    """What git calls a file's content; hubs list the files so that are not in LFS, which are small."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
