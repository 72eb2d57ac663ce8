"""What a folder is called on a hub, where it was read from one: in place, or through the client's cache."""

from __future__ import annotations

import re
from pathlib import Path

from llava_convert.storage.remote.mounts import mounted

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")


def cached_id(folder: Path) -> str | None:
    """The repo id of a folder that lies in a Hub cache (`models--org--name/snapshots/<revision>`)."""
    for parent in (folder, *folder.parents):
        found = _CACHED.fullmatch(parent.name)
        if found:
            return f"{found[1]}/{found[2]}"
    return None


def published(folder: Path) -> dict[str, str]:
    """`repo` and `commit` of a folder that was read from a hub; nothing for others, whose place is private."""
    remote = mounted(folder)
    if remote is not None:
        return {k: v for k, v in (("repo", remote.repo), ("commit", remote.commit)) if v is not None}
    repo = cached_id(folder)
    if repo is None:
        return {}
    place = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    return {"repo": repo} | ({"commit": place.name} if place is not None else {})
