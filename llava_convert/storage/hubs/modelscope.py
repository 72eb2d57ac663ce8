"""Models on ModelScope: read in place by ranges or through the client's cache, and sent by the client.

By modelscope_hub, which `modelscope` brings since its 1.40; facts of sending from its 0.5.1. Its upload keeps a record
of what it has hashed and committed in the folder itself (`.ms_upload_cache`), under each file's name, time and size:
the same folder sent to another server is then skipped as committed. So that record is neither read nor written here:
the client gets one of its own elsewhere (`tracker_path`), with the sha256 that are known, so that it hashes no file
again, and nothing else. The server says what it has, by its listing and, of large files, by the LFS batch request.
"""

from __future__ import annotations

import glob
import io
import tempfile
import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from llava_convert.core.errors import HubError, UsageError
from llava_convert.core.hub_names import Address
from llava_convert.core.retry import patiently
from llava_convert.storage.hubs import Content, Destination, Parcel, Sent, already_public
from llava_convert.storage.hubs.cache import fetched, is_enough, require_listed
from llava_convert.storage.hubs.errors import Asked, asking
from llava_convert.storage.remote.files import Remote

_INSTALL = "pip install 'llava-convert[modelscope]'"

try:
    from modelscope_hub import HubApi
    from modelscope_hub._upload import UploadTracker  # the format of a tracker is its own
    from modelscope_hub.config import get_default_config
    from modelscope_hub.constants import Visibility
    from modelscope_hub.errors import AlreadyExistsError
    from modelscope_hub.errors import HubError as ModelScopeError
except ImportError as problem:
    raise UsageError("ModelScope's client is not installed", hint=_INSTALL) from problem

TITLE = "ModelScope"
BRANCH = "master"
TRIES = 1  # it repeats each request of an upload for minutes
LOGIN = "run `modelscope login`, or set MODELSCOPE_API_TOKEN"

_MODEL = "model"
_PIECE = 256 << 10
_LISTINGS = 2  # the client itself repeats most of what fails there, but for an answer that breaks off

# MODELSCOPE_DOMAIN is called deprecated since 0.5, and is what `modelscope` itself still reads.
warnings.filterwarnings("ignore", "Environment variable MODELSCOPE_", FutureWarning)


def open(address: Address) -> Remote:
    """The model at a branch: the server names no commit, but each file's sha256, which is asked again at the end."""
    where = str(Address(address.hub, address.repo, address.revision))
    revision = address.revision or BRANCH

    def connect() -> HubApi:
        with _asking(address, where):
            return HubApi(endpoint=HubApi().resolve_endpoint_for_read(address.repo))

    api = patiently(where, connect, tries=_LISTINGS)

    def ask() -> dict[str, tuple[int, str]]:
        with _asking(address, where):
            found = api.list_repo_files(address.repo, _MODEL, revision=revision)
            return {one.path: (int(one.size), str(one.sha256)) for one in found if one.type != "tree"}

    answers: list[dict[str, tuple[int, str]]] = []

    def listing() -> dict[str, tuple[int, str]]:
        """Asked anew when something was read since: each file asks at the beginning and at the end."""
        if not answers:
            answers.append(patiently(where, ask, tries=_LISTINGS))
        return answers[-1]

    def read(name: str, start: int, end: int) -> bytes:
        with _asking(address, f"{where}/{name}"):
            response = api.legacy.download_stream(
                address.repo,
                _MODEL,
                name,
                revision,
                headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
            )
            with response:
                data = bytearray()
                for piece in response.iter_content(_PIECE):  # no further, whatever length the headers state
                    data += piece
                    if len(data) > end - start:
                        raise HubError(f"{where}/{name}: the server gives the whole file where a part was asked for")
        answers.clear()
        return bytes(data)

    files = listing()

    def version(name: str) -> str:
        return listing().get(name, (0, "gone"))[1]

    sizes = {name: size for name, (size, _) in files.items()}
    stated = {name: sha256 for name, (_, sha256) in files.items() if len(sha256) == 64}
    return Remote(where, sizes, read, version, repo=address.repo, sha256=stated)


def cached(address: Address, *, whole: bool) -> Path | None:
    """The model's folder in the client's cache, if all of it is there, or what is needed."""
    with suppress(ModelScopeError, ValueError):
        folder = Path(_snapshot(address.repo, revision=address.revision, local_files_only=True))
        return folder if is_enough(folder, whole=whole) else None
    return None


def download(address: Address) -> Path:
    """As `cached`, after fetching what is missing. Raises HubError."""

    def get(patterns: list[str]) -> Path:
        with _asking(address, str(address)):
            return Path(_snapshot(address.repo, revision=address.revision, allow_patterns=patterns))

    folder = fetched(str(address), get)
    require_listed(folder, open(address).sha256, str(address))
    return folder


def _snapshot(repo: str, **options: Any) -> str:
    # Imported late: it costs a second, and an upload does without.
    try:
        from modelscope import snapshot_download
    except ImportError as problem:
        raise UsageError(
            "the cache of ModelScope's client needs the package modelscope, which is not installed",
            hint=_INSTALL,
        ) from problem

    return str(snapshot_download(repo, **options))


def _asking(address: Address, where: str) -> AbstractContextManager[None]:
    return asking(Asked(where, TITLE, LOGIN, address.revision or BRANCH))


# --- sending


def token() -> str | None:
    found: str | None = get_default_config().token
    return found


def require(to: Destination) -> None:
    if to.create_pr:
        raise UsageError("--create-pr: ModelScope's client opens no pull requests", hint="--hub huggingface")


def place(to: Destination) -> str:
    api = HubApi()
    try:
        api.create_repo(to.repo, _MODEL, visibility=Visibility.PRIVATE if to.private else Visibility.PUBLIC)
    except AlreadyExistsError:
        if to.private and api.get_repo(to.repo, _MODEL).visibility == Visibility.PUBLIC:
            raise already_public(to.repo, TITLE) from None
    return f"{get_default_config().endpoint}/models/{to.repo}"


def listing(to: Destination, revision: str) -> dict[str, Content]:
    found = HubApi().list_repo_files(to.repo, _MODEL, revision=revision)
    return {file.path: Content(file.size, file.sha256 or None) for file in found if file.type != "tree"}


def send(parcel: Parcel, names: Collection[str]) -> Sent:
    to = parcel.to
    # It prints a report, and stdout is ours.
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory(prefix="llava-convert-") as place:
        tracker = UploadTracker(Path(place, "tracker"), to.repo)
        for name in names:
            if (known := parcel.known(name)) is not None:
                info = (parcel.folder / name).stat()
                tracker.put_hash(name, info.st_mtime, info.st_size, {"file_hash": known, "file_size": info.st_size})
        tracker.save()
        HubApi().upload_folder(
            to.repo,
            _MODEL,
            parcel.folder,
            commit_message=to.message,
            revision=to.revision or BRANCH,
            allow_patterns=[glob.escape(name) for name in names],
            use_cache=True,
            tracker_path=Path(place, "tracker"),
            disable_tqdm=not parcel.bars,
        )
    return Sent(to.revision or BRANCH)
