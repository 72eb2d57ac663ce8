"""The hubs: one module each, for reading models and for sending them.

`Hub` is what each module offers, HUBS names them. `errors` turns what their clients raise into one sentence and a hint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from llava_convert.core.errors import UsageError
from llava_convert.core.hub_names import Address
from llava_convert.core.values import dataclass
from llava_convert.storage.fingerprints import Digest
from llava_convert.storage.remote.files import Remote

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
HUBS: Mapping[str, str] = {HUGGINGFACE: "hf", MODELSCOPE: "ms"}  # by the module's name, which --hub takes: the scheme
MESSAGE = "Upload by llava-convert"


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
        """The name in cards: the id on the Hugging Face Hub where it goes there, which most readers know."""
        return self.repo if HUGGINGFACE in self.hubs else f"ms://{self.repo}"


@dataclass(frozen=True)
class Content:
    """A file on a hub: its size and digest. A hub gives sha256, or git's sha1 of the blob, or neither."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Parcel:
    """A folder and what of it is published: by path, with digests."""

    folder: Path
    files: Mapping[str, Digest]
    to: Destination
    bars: bool = False  # the clients may draw theirs

    def known(self, name: str) -> str | None:
        """The sha256 of a file, None where the file is another by now, so that a client has to make its own."""
        return self.files[name].sha256 if self.files[name].holds(self.folder / name) else None


@dataclass(frozen=True)
class Sent:
    """What a client made of an upload."""

    revision: str
    commit: str | None = None
    url: str | None = None


class Hub(Protocol):
    """A hub's module. Importing it raises UsageError (exit 2) where its client is not installed.

    The functions that read raise HubError (exit 8). `place`, `listing` and `send` raise what the client raises, and are
    called within `errors.asking`.
    """

    TITLE: str
    BRANCH: str  # the one that a repository starts with
    LOGIN: str  # what gives its client a token
    TRIES: int  # of `send`, by how much its client repeats by itself

    def open(self, address: Address) -> Remote:
        """The model, to be read in place by ranges."""
        ...

    def cached(self, address: Address, *, whole: bool) -> Path | None:
        """The model's folder in the client's cache, if all of it is there; not `whole`, if its config is."""
        ...

    def download(self, address: Address) -> Path:
        """The folder in the client's cache, after fetching what is missing."""
        ...

    def token(self) -> str | None: ...

    def require(self, to: Destination) -> None:
        """Raises UsageError where the hub cannot do what is asked."""

    def place(self, to: Destination) -> str:
        """Make repository and branch where they do not exist; returns the repository's address."""
        ...

    def listing(self, to: Destination, revision: str) -> dict[str, Content]: ...

    def send(self, parcel: Parcel, names: Collection[str]) -> Sent: ...


def hub(name: str) -> Hub:
    return cast(Hub, import_module(f"{__name__}.{name}"))


def hub_of(address: Address) -> Hub:
    return hub(next(name for name, scheme in HUBS.items() if scheme == address.hub))


def already_public(repo: str, title: str) -> UsageError:
    return UsageError(
        f"{repo} is on {title} already and is public; --private makes new repositories private and hides none",
        hint="hide it in its settings first, or publish without --private",
    )
