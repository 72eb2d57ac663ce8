"""Models on the Hugging Face Hub: read in place by ranges or through the client's cache, and sent by the client.

Facts of sending from huggingface_hub 2.4.0; the calls are there since 0.26. `create_commit` does the work: it sends
what the hub lacks, through Xet or its LFS, and commits once; a rerun sends nothing twice. Other than `upload_folder`,
it can be told a sha256 that is known (`UploadInfo`), so that the client does not read each file to make it. Through Xet
the client's hf_xet reads a file once in any case, to split and send it, and hashes the rest then. (Releases before 2.0
hash when an operation is made; `upload_large_folder` is gone in 2.x.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile, RepoSibling
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from llava_convert.core.errors import UsageError
from llava_convert.core.hub_names import Address
from llava_convert.core.retry import FIRST_TRIES, TransientError, patiently
from llava_convert.storage.hubs import Content, Destination, Parcel, Sent, already_public
from llava_convert.storage.hubs.cache import fetched, is_enough, require_listed
from llava_convert.storage.hubs.errors import Asked, asking
from llava_convert.storage.remote.files import WEIGHTS, Remote

TITLE = "the Hugging Face Hub"
BRANCH = "main"
TRIES = 3  # it repeats neither the commit (without Xet) nor the check of the card
LOGIN = "run `hf auth login`, or set HF_TOKEN"

_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds to connect, and between two bytes; set by the variable


def open(address: Address) -> Remote:
    """The model at one commit: what a branch means is asked once, so that it cannot move meanwhile."""
    where = str(address)

    def ask() -> tuple[str, dict[str, Content]]:
        with _asking(address):
            return _files(address)

    commit, files = patiently(where, ask, tries=FIRST_TRIES)

    places: dict[str, str] = {}  # where weights are sent from, which is asked once a file

    def read(name: str, start: int, end: int) -> bytes:
        with _asking(address, f"{where}/{name}"):
            url = huggingface_hub.hf_hub_url(address.repo, name, revision=commit)
            place = places.get(name)
            if not name.lower().endswith(WEIGHTS):
                place = url
            elif place is None:
                place = places[name] = _place(url)
            # A signed address of another host refuses the Hub's token, which is none of its business either.
            mine = build_hf_headers() if urlsplit(place).netloc == urlsplit(url).netloc else {}
            headers = {**mine, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            try:
                return _body(place, headers, end - start + 1)
            except HfHubHTTPError as problem:
                if problem.response.status_code != 403 or mine or place == url:
                    raise
                places.pop(name, None)  # another thread may have been first
                raise TransientError("the address that the Hub gave has expired") from None

    # At a commit nothing changes.
    root = str(Address(address.hub, address.repo, address.revision))
    sizes = {name: content.size for name, content in files.items()}
    stated = {name: content.sha256 for name, content in files.items() if content.sha256 is not None}
    return Remote(root, sizes, read, lambda name: commit, repo=address.repo, commit=commit, sha256=stated)


def _body(url: str, headers: Mapping[str, str], most: int) -> bytes:
    """An answer's body as it is sent, and no more of it than is asked for, whatever the server makes of a range."""
    session: Any = get_session()
    if not hasattr(session, "stream"):  # that of requests, in huggingface_hub before 1.0
        with session.get(url, headers=headers, timeout=_TIMEOUT, stream=True) as response:
            hf_raise_for_status(response)
            return bytes(response.raw.read(most, decode_content=False))
    body = bytearray()
    with session.stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
        if response.is_error:
            response.read()  # for the message
        hf_raise_for_status(response)
        for piece in response.iter_raw():
            body += piece
            if len(body) >= most:
                break
    return bytes(body[:most])


def _files(address: Address) -> tuple[str, dict[str, Content]]:
    """The commit, and size and sha256 of each file, the latter where it is in LFS.

    One request at the Hub; a mirror may know less of its calls.
    """
    api = huggingface_hub.HfApi()
    commit: str = address.revision or BRANCH
    found: dict[str, RepoSibling | RepoFile] = {}
    try:
        info = api.model_info(address.repo, revision=address.revision, files_metadata=True, timeout=_TIMEOUT)
        commit, found = info.sha or commit, {one.rfilename: one for one in info.siblings or ()}
    except HfHubHTTPError as problem:
        if problem.response.status_code != 404 or "X-Error-Code" in problem.response.headers:
            raise
    if not found or any(one.size is None for one in found.values()):
        tree = api.list_repo_tree(address.repo, recursive=True, revision=commit)
        found = {one.path: one for one in tree if isinstance(one, RepoFile)}
    stated = {name: one.lfs.sha256 if one.lfs else None for name, one in found.items()}
    return commit, {name: Content(int(one.size or 0), stated[name]) for name, one in found.items()}


def _place(url: str) -> str:
    """Where the Hub sends who asks for a file; the same address where it cannot be asked that."""
    try:
        return huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT).location
    except HfHubHTTPError as problem:
        if problem.response.status_code not in (404, 405, 501):
            raise
        return url


def cached(address: Address, *, whole: bool) -> Path | None:
    """The model's folder in the client's cache, if all of it is there, or what is needed."""
    with suppress(LocalEntryNotFoundError, HFValidationError):
        folder = Path(huggingface_hub.snapshot_download(address.repo, revision=address.revision, local_files_only=True))
        return folder if is_enough(folder, whole=whole) else None
    return None


def download(address: Address) -> Path:
    """As `cached`, after fetching what is missing. Raises HubError."""

    def get(patterns: list[str]) -> Path:
        with _asking(address):
            return Path(
                huggingface_hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns)
            )

    folder = fetched(str(address), get)
    at = replace(address, revision=folder.name, path="")  # the commit that was fetched, whatever the branch is now
    require_listed(folder, open(at).sha256, str(address))
    return folder


def _asking(address: Address, where: str | None = None) -> AbstractContextManager[None]:
    return asking(Asked(where or str(address), TITLE, LOGIN, address.revision or BRANCH))


# --- sending


def token() -> str | None:
    return huggingface_hub.get_token()


def require(to: Destination) -> None:
    if to.create_pr and to.revision not in (None, BRANCH):
        raise UsageError(
            "--create-pr with --revision: a pull request is opened against the main branch",
            hint="leave one of them out; --revision refs/pr/N alone adds to the pull request N",
        )


def _api() -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(library_name="llava-convert")


def place(to: Destination) -> str:
    api = _api()
    if to.private:
        api.create_repo(to.repo, private=True, exist_ok=True)
        if not api.model_info(to.repo).private:
            raise already_public(to.repo, TITLE)
    else:
        api.create_repo(to.repo, exist_ok=True)
    if to.revision not in (None, BRANCH) and not to.revision.startswith("refs/"):
        api.create_branch(to.repo, branch=to.revision, exist_ok=True)
    return f"{api.endpoint}/{to.repo}"


def listing(to: Destination, revision: str) -> dict[str, Content]:
    found = {}
    for entry in _api().list_repo_tree(to.repo, recursive=True, revision=revision):
        if isinstance(entry, RepoFile):
            # Of a file in LFS the blob is its pointer, so that git's sha1 says nothing of the content.
            lfs = entry.lfs
            found[entry.path] = Content(entry.size, lfs.sha256) if lfs else Content(entry.size, git_sha1=entry.blob_id)
    return found


def send(parcel: Parcel, names: Collection[str]) -> Sent:
    to, api = parcel.to, _api()
    hidden = not parcel.bars and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        made = api.create_commit(
            repo_id=to.repo,
            operations=[_addition(parcel, name) for name in names],
            revision=None if to.create_pr else to.revision,
            create_pr=to.create_pr,
            commit_message=to.message,
        )
    finally:
        if hidden:
            enable_progress_bars()
    if made.pr_revision is not None:
        return Sent(made.pr_revision, made.oid, made.pr_url)
    return Sent(to.revision or BRANCH, made.oid)


def _addition(parcel: Parcel, name: str) -> huggingface_hub.CommitOperationAdd:
    made = huggingface_hub.CommitOperationAdd(name, parcel.folder / name)
    known = parcel.known(name)
    if known is not None:
        made.upload_info.sha256 = bytes.fromhex(known)
    return made
