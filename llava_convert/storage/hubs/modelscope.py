"""Models on ModelScope: read in place by ranges, or through the client's cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava_convert.core.errors import HubError, UsageError
from llava_convert.core.hub_names import Address
from llava_convert.storage.remote.cache import fetched, is_enough
from llava_convert.storage.remote.files import Remote, TransientError, patiently, refuse

try:
    import requests
    from modelscope import snapshot_download
    from modelscope_hub import HubApi
    from modelscope_hub.errors import APIError, NetworkError, NotExistError
    from modelscope_hub.errors import HubError as ModelScopeError
except ImportError as problem:
    raise UsageError(
        "models of ModelScope are read by its client, which is not installed",
        hint="pip install 'llava-convert[modelscope]'",
    ) from problem

# MODELSCOPE_DOMAIN is called deprecated since 0.5, and is what `modelscope` itself still reads.
warnings.filterwarnings("ignore", "Environment variable MODELSCOPE_", FutureWarning)

_LISTINGS = 2  # the client itself repeats most of what fails there, but for an answer that breaks off


def open(address: Address) -> Remote:
    """The model at a branch: the server names no commit, but each file's sha256, which is asked again at the end."""
    where = str(Address(address.hub, address.repo, address.revision))
    revision = address.revision or "master"

    def connect() -> HubApi:
        with _asking(where):
            return HubApi(endpoint=HubApi().resolve_endpoint_for_read(address.repo))

    api = patiently(where, connect, tries=_LISTINGS)

    def ask() -> dict[str, tuple[int, str]]:
        with _asking(where):
            found = api.list_repo_files(address.repo, "model", revision=revision)
        return {one.path: (int(one.size), str(one.sha256)) for one in found if one.type != "tree"}

    answers: list[dict[str, tuple[int, str]]] = []

    def listing() -> dict[str, tuple[int, str]]:
        """Asked anew when something was read since: each file asks at the beginning and at the end."""
        if not answers:
            answers.append(patiently(where, ask, tries=_LISTINGS))
        return answers[-1]

    def read(name: str, start: int, end: int) -> bytes:
        with _asking(f"{where}/{name}"):
            response = api.legacy.download_stream(
                address.repo,
                "model",
                name,
                revision,
                headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
            )
            with response:
                if int(response.headers.get("Content-Length", 0)) > end - start:
                    raise HubError(f"{where}/{name}: the server gives the whole file where a part was asked for")
                data = bytes(response.content)
        answers.clear()
        return data

    files = listing()

    def version(name: str) -> str:
        return listing().get(name, (0, "gone"))[1]

    return Remote(where, {name: size for name, (size, _) in files.items()}, read, version, repo=address.repo)


def cached(address: Address, *, whole: bool) -> Path | None:
    """The model's folder in the client's cache, if all of it is there, or what is needed."""
    with suppress(ModelScopeError, ValueError):
        folder = Path(snapshot_download(address.repo, revision=address.revision, local_files_only=True))
        return folder if is_enough(folder, whole=whole) else None
    return None


def download(address: Address) -> Path:
    """As `cached`, after fetching what is missing. Raises HubError."""

    def get(patterns: list[str]) -> Path:
        with _asking(str(address)):
            return Path(snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns))

    return fetched(str(address), get)


@contextmanager
def _asking(where: str) -> Iterator[None]:
    """What the client raises becomes HubError, or TransientError where asking again may help."""
    try:
        yield
    except NotExistError:
        raise HubError(
            f"{where}: there is no such model or revision, or it is private and no token that may read it is in use",
            hint="check the name; for a private one `modelscope login`, or set MODELSCOPE_API_TOKEN",
        ) from None
    except APIError as problem:
        if problem.status_code is None:
            raise HubError(f"{where}: the server refused") from None
        refuse(where, problem.status_code, {})
    except (NetworkError, requests.RequestException) as problem:
        raise TransientError(f"the connection failed ({type(problem).__name__})") from None
    except (ModelScopeError, ValueError) as problem:
        raise HubError(f"{where}: {str(problem).strip().splitlines()[0][:200]}") from None
