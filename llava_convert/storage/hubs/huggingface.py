"""Models on the Hugging Face Hub: read in place by ranges, or through the client's cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from llava_convert.core.errors import HubError
from llava_convert.core.hub_names import Address
from llava_convert.storage.remote.cache import fetched, is_enough
from llava_convert.storage.remote.files import FIRST_TRIES, WEIGHTS, Remote, TransientError, patiently, refuse

_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds to connect, and between two bytes; set by the variable


def open(address: Address) -> Remote:
    """The model at one commit: what a branch means is asked once, so that it cannot move meanwhile."""
    where = str(address)

    def ask() -> tuple[str, dict[str, int]]:
        with _asking(where):
            return _files(address)

    commit, files = patiently(where, ask, tries=FIRST_TRIES)

    places: dict[str, str] = {}  # where weights are sent from, which is asked once a file

    def read(name: str, start: int, end: int) -> bytes:
        with _asking(f"{where}/{name}"):
            url = huggingface_hub.hf_hub_url(address.repo, name, revision=commit)
            place = places.get(name)
            if not name.lower().endswith(WEIGHTS):
                place = url
            elif place is None:
                place = places[name] = _place(url)
            # A signed address of another host refuses the Hub's token, which is none of its business either.
            mine = build_hf_headers() if urlsplit(place).netloc == urlsplit(url).netloc else {}
            headers = {**mine, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            response = get_session().get(place, headers=headers, timeout=_TIMEOUT)
            if response.status_code == 403 and not mine and place != url:
                places.pop(name, None)  # another thread may have been first
                raise TransientError("the address that the Hub gave has expired")
            hf_raise_for_status(response)
            return bytes(response.content)

    # At a commit nothing changes.
    root = str(Address(address.hub, address.repo, address.revision))
    return Remote(root, files, read, lambda name: commit, repo=address.repo, commit=commit)


def _files(address: Address) -> tuple[str, dict[str, int]]:
    """The commit and the size of each file. One request at the Hub; a mirror may know less of its calls."""
    api = huggingface_hub.HfApi()
    commit, sizes = address.revision or "main", {}
    try:
        info = api.model_info(address.repo, revision=address.revision, files_metadata=True, timeout=_TIMEOUT)
        commit, sizes = info.sha or commit, {one.rfilename: one.size for one in info.siblings or ()}
    except HfHubHTTPError as problem:
        if problem.response.status_code != 404 or "X-Error-Code" in problem.response.headers:
            raise
    if not sizes or None in sizes.values():
        tree = api.list_repo_tree(address.repo, recursive=True, revision=commit)
        sizes = {one.path: one.size for one in tree if isinstance(one, RepoFile)}
    return commit, {name: int(size or 0) for name, size in sizes.items()}


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
        with _asking(str(address)):
            return Path(
                huggingface_hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns)
            )

    return fetched(str(address), get)


@contextmanager
def _asking(where: str) -> Iterator[None]:
    """What the client raises becomes HubError, or TransientError where asking again may help."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError(f"{where}: offline mode is on (HF_HUB_OFFLINE), and the cache does not hold it") from None
    except GatedRepoError:
        raise HubError(
            f"{where}: access is given on request, and not to the token in use",
            hint="ask for access on its page, then `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{where}: there is no such revision") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{where}: there is no such model, or it is private and no token that may read it is in use",
            hint="check the name; for a private one `hf auth login`, or set HF_TOKEN",
        ) from None
    except HFValidationError as problem:
        raise HubError(f"{where}: {str(problem).splitlines()[0]}") from None
    except HfHubHTTPError as problem:
        refuse(where, problem.response.status_code, problem.response.headers)
    except LocalEntryNotFoundError:  # what a download raises for any trouble of the network
        raise TransientError("the connection failed") from None
    except (OSError, _transport_error()) as problem:
        raise TransientError(f"the connection failed ({type(problem).__name__})") from None


def _transport_error() -> type[Exception]:
    """What the HTTP library below the client raises: it was requests (an OSError) up to 0.36, and is httpx since."""
    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    found: type[Exception] = getattr(library, "HTTPError", OSError)
    return found
