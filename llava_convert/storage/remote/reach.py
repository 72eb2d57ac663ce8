"""Where a source can lie: here, on a hub (`storage.hubs`), or at any URL that fsspec reads (`urls`).

Whatever it is, a path comes of it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llava_convert.core import hub_names
from llava_convert.core.errors import HubError, InputError, UsageError
from llava_convert.core.hub_names import Address
from llava_convert.core.text import nearest, printable
from llava_convert.storage.hubs import HUBS, Hub, hub_of
from llava_convert.storage.hubs.secrets import shown
from llava_convert.storage.remote.files import WEIGHTS
from llava_convert.storage.remote.mounts import MountedPath
from llava_convert.storage.remote.session import Session

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])(.*)")  # a Path keeps one of the slashes; C:/ is a drive


def reach(source: str | Path, session: Session, *, cache: bool = False) -> Path:
    """The path that a source is read by: a local one as it is, a remote one mounted (no weight is fetched).

    A hub's model that lies whole in its client's cache is read there; `cache` puts it there first. Raises InputError
    for a source which is not there, HubError where a hub or server refuses, UsageError for what is missing here.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    if (url := _URL.fullmatch(text)) is not None:
        scheme, rest = url.groups()
        if scheme == "file":
            return Path("/" + rest)
        if scheme not in HUBS.values():
            return _at_url(f"{scheme}://{rest}", session, cache)
        address = hub_names.parse(f"{scheme}://{rest}")
        if address is None:
            raise UsageError(
                f"{shown(f'{scheme}://{rest}')} is not the address of a model",
                hint=f"write {scheme}://ORG/NAME, with @REVISION and /PATH where needed, and nothing else",
            )
        return on_hub(address, session, cache=cache)
    here = source if isinstance(source, Path) else Path(source)
    if isinstance(here, MountedPath):  # of a session around this one
        session.call(here.mount.root, here.mount.remote.address)
    if _is_there(here):
        return here.expanduser()
    address = hub_names.parse(text)
    if address is None or text.lower().endswith(WEIGHTS):
        near = _beside(here)
        wanted = "give a file or a folder, a model on a hub (ORG/NAME, hf://…, ms://…), or a URL"
        raise InputError(f"{text} does not exist", hint=f"{near} Else {wanted}" if near else wanted)
    try:
        return on_hub(address, session, cache=cache)
    except HubError as problem:
        raise HubError(f"there is no {text} here, and {problem.message}", hint=problem.hint) from problem


def url_of(out: Path) -> str | None:
    """The URL that an output's place is, or None for a place here. Raises UsageError for a hub."""
    url = _URL.fullmatch(out.as_posix())
    if url is None:
        return None
    if url[1] in HUBS.values():
        address = shown(f"{url[1]}://{url[2]}")
        raise UsageError(
            f"-o {address}: outputs are sent to hubs when they are whole and verified",
            hint=f"leave -o out, and give --push {address.partition('://')[2]}",
        )
    return f"{url[1]}://{url[2]}"


def on_hub(address: Address, session: Session, *, cache: bool = False, weights: bool = True) -> Path:
    """The folder, or the file, of a model on a hub; without `weights` its config is enough.

    Raises HubError, and UsageError where its client is missing.
    """
    client = hub_of(address)
    folder = client.cached(address, whole=weights)
    if folder is None:
        if cache:
            folder = client.download(address)
        else:
            root = session.once(replace(address, path=""), lambda: _mounted(client, address, session))
            return _inside(root, address.path)
    session.call(folder, str(Address(address.hub, address.repo, address.revision)))
    return _inside(folder, address.path)


def _mounted(client: Hub, address: Address, session: Session) -> Path:
    remote = client.open(address)
    if not remote.files:
        raise HubError(
            f"{address}: the hub lists no file of it",
            hint="check the name, and the network, where a proxy may answer instead of the hub",
        )
    return session.mount(remote).root


def _at_url(url: str, session: Session, cache: bool) -> Path:
    from llava_convert.storage.remote import urls

    if cache:
        raise UsageError(f"--cache is for models of the hubs; {shown(url)} is read in place")
    remote, file = urls.open(url)
    return session.mount(remote).root / file


def _is_there(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long; an unknown user; a NUL
        return False


def _beside(path: Path) -> str | None:
    """The question for a mistyped path: does it mean the file beside it that has the nearest name?"""
    try:
        near = nearest(path.name, [one.name for one in path.expanduser().parent.iterdir()])
    except (OSError, RuntimeError, ValueError):
        return None
    return None if near is None else f"did you mean {printable(path.with_name(near))}?"


def _inside(root: Path, path: str) -> Path:
    if not (root / path).exists():
        raise InputError(f"{root} has no {path}")
    return root / path
