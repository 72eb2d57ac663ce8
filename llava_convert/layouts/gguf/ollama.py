"""The GGUF files of a model in Ollama's store, where files are named by their digests.

A manifest (`manifests/registry.ollama.ai/library/llava/7b`) lists a model's layers with their kinds and digests; they
lie in `blobs/`, each named `sha256-` and its digest (ollama, server/manifest.go, manifest/layer.go).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.text import printable
from llava_convert.storage.files import require_inside
from llava_convert.storage.headers import Headers
from llava_convert.storage.json_files import read_json

BLOBS, MANIFESTS = "blobs", "manifests"
_PREFIX = "sha256-"
_MODEL, _PROJECTOR = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"
_START = b"{"
_LARGEST = 1 << 20  # of a manifest, which has a few layers
_MOST = 10_000  # manifests that are looked through for a blob


def is_manifest(path: Path, headers: Headers) -> bool:
    """Whether a file is a manifest: within such a store, and an object in JSON."""
    return (
        MANIFESTS in path.absolute().parts
        and headers.start(path).lstrip().startswith(_START)
        and bool(layers(path, _MODEL))
    )


def is_blob(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.parent.name == BLOBS


def files_of(manifest: Path) -> tuple[Path, Path | None]:
    """Language model and projector of a manifest, the second None where it has none.

    Raises InputError where a blob is missing.
    """
    store = next(parent for parent in manifest.absolute().parents if parent.name == MANIFESTS).parent
    found: list[Path | None] = []
    for kind in (_MODEL, _PROJECTOR):
        digests = layers(manifest, kind)
        path = require_inside(store / BLOBS, digests[0].replace(":", "-")) if digests else None
        if path is not None and not path.is_file():
            raise InputError(
                f"{printable(manifest)}: its {digests[0]} is not in {printable(store / BLOBS)}",
                hint="`ollama pull` gets it again",
            )
        found.append(path)
    llm, mmproj = found
    assert llm is not None  # is_manifest has seen it
    return llm, mmproj


def projector_of(blob: Path) -> Path | None:
    """The projector that goes with a language model's blob, as the store's manifests say; None where none does."""
    digest = blob.name.replace("-", ":", 1)
    for manifest in _manifests(blob.parent.parent / MANIFESTS):
        if digest in layers(manifest, _MODEL):
            return files_of(manifest)[1]
    return None


def _manifests(folder: Path) -> Iterator[Path]:
    for count, path in enumerate(sorted(folder.rglob("*")) if folder.is_dir() else ()):
        if count > _MOST:
            return
        if path.is_file() and path.stat().st_size <= _LARGEST:
            yield path


def layers(manifest: Path, kind: str) -> list[str]:
    """The digests of a manifest's layers of a kind; none of a file that is no manifest."""
    try:
        content: Any = read_json(manifest, limit=_LARGEST)
    except InputError:
        return []
    listed = content.get("layers") if isinstance(content, dict) else None
    return [
        str(layer["digest"])
        for layer in (listed if isinstance(listed, list) else ())
        if isinstance(layer, Mapping) and layer.get("mediaType") == kind and _is_digest(layer.get("digest"))
    ]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:") and value[7:].isalnum()
