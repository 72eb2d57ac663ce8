"""Base models from the hubs: the local cache first, then the network. Ids: `org/name`, `ms://org/name[@revision]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llava_convert.errors import HubError, UsageError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODELSCOPE = "ms://"

# What a base model is for: weights, config, tokenizer, image processor. No code, no other framework's weights.
_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_OLD_WEIGHTS = ["pytorch_model*.bin"]


def is_id(text: str) -> bool:
    """Whether a text can be a hub id (it can still be a folder's path)."""
    return _ID.fullmatch(text.removeprefix(MODELSCOPE).partition("@")[0]) is not None


def published_id(name: str) -> str:
    """The id as configs name it: without the hub and the revision."""
    return name.removeprefix(MODELSCOPE).partition("@")[0]


def fetch(name: str, *, weights: bool) -> Path:
    """The folder of a hub's model in its client's cache, downloaded where it is not there yet.

    Without `weights` configs and tokenizer alone. Raises HubError (exit 8) saying why it cannot be had, UsageError
    (exit 2) when the hub's client is not installed.
    """
    wanted = _FILES + _WEIGHTS if weights else _FILES
    get = _from_modelscope if name.startswith(MODELSCOPE) else _from_huggingface
    folder = get(name, wanted, complete=weights)
    if weights and not any(folder.glob("*.safetensors")):
        folder = get(name, wanted + _OLD_WEIGHTS, complete=True)
    return folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _from_huggingface(name: str, wanted: Sequence[str], *, complete: bool) -> Path:
    # Imported late: most conversions never ask a hub, and the import costs 0.2 s.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, revision = name.partition("@")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision or None, local_files_only=True, allow_patterns=list(wanted)
            )
        )
        if not complete or _has_weights(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=list(wanted)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError) as problem:
        raise HubError(_first_line(problem)) from problem


def _from_modelscope(name: str, wanted: Sequence[str], *, complete: bool) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope_hub.errors import HubError as ModelScopeError
    except ImportError as problem:
        raise UsageError(
            f"{name} is on ModelScope, whose client is not installed", hint="pip install llava-convert[modelscope]"
        ) from problem
    repo, _, revision = name.removeprefix(MODELSCOPE).partition("@")
    try:
        folder = Path(
            snapshot_download(repo, revision=revision or None, local_files_only=True, allow_patterns=list(wanted))
        )
        if not complete or _has_weights(folder):
            return folder
    except (ModelScopeError, ValueError):
        pass
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(wanted)))
    except (ModelScopeError, OSError, ValueError) as problem:
        raise HubError(_first_line(problem)) from problem


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__
