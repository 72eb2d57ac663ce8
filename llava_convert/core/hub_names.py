"""What models are called on the hubs: `org/name`, `hf://org/name@revision/path`, `ms://org/name`."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from llava_convert.core.values import dataclass

# A revision is a branch, a tag or a commit; of those with a slash only the Hub's own references are told from a path.
_ADDRESS = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<rev>refs/(?:pr|convert)/[\w.-]+|[\w.-]+))?(?P<path>/.*)?"
)
SCHEMES = ("hf", "ms")


@dataclass(frozen=True)
class Address:
    """A model on a hub, or a folder or file in it. `hub` is the scheme, without a revision it is the default branch."""

    hub: str
    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")


def parse(text: str) -> Address | None:
    """The address that a text is; `org/name`, with or without a revision, is one of the Hugging Face Hub."""
    scheme, _, rest = text.rpartition("://")
    found = _ADDRESS.fullmatch(rest.rstrip("/"))
    if found is None or scheme not in ("", *SCHEMES) or (not scheme and found["path"]):
        return None
    path = str(PurePosixPath(found["path"].strip("/"))) if found["path"] else ""
    return Address(scheme or "hf", found["repo"], found["rev"], path)


def is_id(text: str) -> bool:
    """Whether a text can name a model on a hub (it can still be a folder's path)."""
    address = parse(text)
    return address is not None and not address.path


def last_name(path: str) -> str:
    """The last part of a path of any system, or of a hub's id."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def published_id(name: str) -> str:
    """The id as configs name it: without the hub and the revision."""
    address = parse(name)
    return address.repo if address is not None else name
