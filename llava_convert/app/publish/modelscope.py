"""ModelScope, by modelscope_hub, which `modelscope` brings since its 1.40. Facts from its 0.5.1.

Its upload keeps a record of what it has committed in the folder itself (`.ms_upload_cache`), under each file's name,
time and size: the same folder sent to another server is then skipped as committed. So the record is neither read nor
written here; what is there already the server tells, by its listing and, of large files, by the LFS batch request.
"""

from __future__ import annotations

import glob
import io
import warnings
from collections.abc import Collection
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from llava_convert.app.publish.huggingface import already_public
from llava_convert.app.publish.publish import Content, Destination, Parcel, Sent
from llava_convert.core.errors import UsageError

# MODELSCOPE_DOMAIN is called deprecated since 0.5, and is what `modelscope` itself still reads.
warnings.filterwarnings("ignore", "Environment variable MODELSCOPE_", FutureWarning)

TITLE = "ModelScope"
BRANCH = "master"
TRIES = 1  # it repeats each request of an upload for minutes
LOGIN = "run `modelscope login`, or set MODELSCOPE_API_TOKEN"

_MODEL = "model"


def require(to: Destination) -> None:
    if find_spec("modelscope_hub") is None:
        raise UsageError("ModelScope's client is not installed", hint="pip install 'llava-convert[modelscope]'")
    if to.create_pr:
        raise UsageError("--create-pr: ModelScope's client opens no pull requests", hint="--hub huggingface")


def token() -> str | None:
    from modelscope_hub.config import get_default_config

    found: str | None = get_default_config().token
    return found


def _api() -> Any:
    from modelscope_hub import HubApi

    return HubApi()


def place(to: Destination) -> str:
    from modelscope_hub.config import get_default_config
    from modelscope_hub.constants import Visibility
    from modelscope_hub.errors import AlreadyExistsError

    api = _api()
    try:
        api.create_repo(to.repo, _MODEL, visibility=Visibility.PRIVATE if to.private else Visibility.PUBLIC)
    except AlreadyExistsError:
        if to.private and api.get_repo(to.repo, _MODEL).visibility == Visibility.PUBLIC:
            raise already_public(to.repo, TITLE) from None
    return f"{get_default_config().endpoint}/models/{to.repo}"


def listing(to: Destination, revision: str) -> dict[str, Content]:
    found = _api().list_repo_files(to.repo, _MODEL, revision=revision)
    return {file.path: Content(file.size, file.sha256 or None) for file in found if file.type != "tree"}


def send(parcel: Parcel, names: Collection[str]) -> Sent:
    to = parcel.to
    with redirect_stdout(io.StringIO()):  # it prints a report, and stdout is ours
        _api().upload_folder(
            to.repo,
            _MODEL,
            parcel.folder,
            commit_message=to.message,
            revision=to.revision or BRANCH,
            allow_patterns=[glob.escape(name) for name in names],
            use_cache=False,
            disable_tqdm=not parcel.bars,
        )
    return Sent(to.revision or BRANCH)
