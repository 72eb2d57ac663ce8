"""The Hugging Face Hub, by huggingface_hub. Facts from its 2.4.0; the calls are there since 0.26.

`upload_folder` does the work: through Xet it hashes, splits and commits as it goes, without Xet it sends what the hub's
LFS lacks and commits once. Either way a rerun sends nothing twice. (`upload_large_folder` is gone in 2.x.)
"""

from __future__ import annotations

import glob
from collections.abc import Collection
from typing import TYPE_CHECKING

from llava_convert.app.publish.publish import Content, Destination, Parcel, Sent
from llava_convert.core.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TITLE = "the Hugging Face Hub"
BRANCH = "main"
TRIES = 3  # it repeats neither the commit (without Xet) nor the check of the card
LOGIN = "run `hf auth login`, or set HF_TOKEN"


def require(to: Destination) -> None:
    if to.create_pr and to.revision not in (None, BRANCH):
        raise UsageError(
            "--create-pr with --revision: a pull request is opened against the main branch",
            hint="leave one of them out; --revision refs/pr/N alone adds to the pull request N",
        )


def token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _api() -> HfApi:
    # Imported late: it costs 0.2 s.
    from huggingface_hub import HfApi

    return HfApi(library_name="llava-convert")


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


def already_public(repo: str, title: str) -> UsageError:
    return UsageError(
        f"{repo} is on {title} already and is public; --private makes new repositories private and hides none",
        hint="hide it in its settings first, or publish without --private",
    )


def listing(to: Destination, revision: str) -> dict[str, Content]:
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for entry in _api().list_repo_tree(to.repo, recursive=True, revision=revision):
        if isinstance(entry, RepoFile):
            # Of a file in LFS the blob is its pointer, so that git's sha1 says nothing of the content.
            lfs = entry.lfs
            found[entry.path] = Content(entry.size, lfs.sha256) if lfs else Content(entry.size, git_sha1=entry.blob_id)
    return found


def send(parcel: Parcel, names: Collection[str]) -> Sent:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    to, api = parcel.to, _api()
    hidden = not parcel.bars and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        made = api.upload_folder(
            repo_id=to.repo,
            folder_path=parcel.folder,
            allow_patterns=[glob.escape(name) for name in names],
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
