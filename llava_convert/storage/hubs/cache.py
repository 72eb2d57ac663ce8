"""What of a hub's model its client is asked to keep, and whether all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llava_convert.core.errors import ConvertError
from llava_convert.core.retry import patiently
from llava_convert.storage.fingerprints import digests
from llava_convert.storage.json_files import read_object
from llava_convert.storage.remote.files import unlike_listing

# No code, and no other framework's weights; torch's own only where there are no safetensors.
_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.md"]
_WEIGHTS = ["*.safetensors", "*.gguf"]
_OLD_WEIGHTS = ["*.bin", "*.pth", "*.pt"]


def fetched(where: str, get: Callable[[list[str]], Path]) -> Path:
    """The folder that a client's `get` makes of the files which match patterns. Raises HubError."""
    folder = patiently(where, lambda: get(_FILES + _WEIGHTS))
    if not _weights(folder, _WEIGHTS):
        folder = patiently(where, lambda: get(_FILES + _WEIGHTS + _OLD_WEIGHTS))
    return folder


def is_enough(folder: Path, *, whole: bool) -> bool:
    """Whether a folder holds weights, and every shard that an index in it names; or a config, where that is asked for.

    An earlier call of someone else's may have fetched a config alone, or some of the shards.
    """
    if not whole:
        return (folder / "config.json").is_file()
    if not _weights(folder, _WEIGHTS + _OLD_WEIGHTS):
        return False
    for index in folder.rglob("*.index.json"):
        try:
            shards = read_object(index).get("weight_map")
        except ConvertError:  # told when it is opened as a source
            continue
        if isinstance(shards, dict) and not all((index.parent / str(name)).is_file() for name in shards.values()):
            return False
    return True


def require_listed(folder: Path, sha256: Mapping[str, str], address: str) -> None:
    """Compare what was fetched into a folder with the sha256 that the hub's listing states.

    Raises HubError for the first that is another; it is removed, so that nobody takes it for the model's later.
    """
    names = [name for name in sha256 if (folder / name).is_file()]
    for name, found in digests(folder, names).items():
        if found.sha256 != sha256[name]:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)  # a link, where the cache keeps contents apart
            raise unlike_listing(f"{address}/{name}")


def _weights(folder: Path, patterns: list[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.rglob(pattern))
