"""conversion.json as an earlier conversion left it: read, checked, and used on the way back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.storage.fingerprints import identity
from llava_convert.storage.sidecars import Sidecars

RECORD = "conversion.json"


def read_record(files: Sidecars) -> dict[str, Any] | None:
    """What an earlier conversion wrote into a folder, or None."""
    if not files.has(RECORD):
        return None
    found = files.read_json(RECORD)
    if not isinstance(found, dict) or not _sound(found.get("added")):
        raise InputError(
            f"{files.place(RECORD)}: not what a conversion writes", hint="delete it: the weights do not need it"
        )
    return found


def read_options(files: Sidecars) -> dict[str, Any] | None:
    """The options that a conversion recorded of its output, None where there are none that can be read."""
    options = readable_record(files).get("options")
    return options if isinstance(options, dict) else None


def readable_record(files: Sidecars) -> dict[str, Any]:
    """As `read_record`, for who can do without: empty where there is none, or none that can be read."""
    try:
        return read_record(files) or {}
    except InputError:
        return {}


def merged_already(files: Sidecars, adapter: Iterable[Path]) -> bool:
    """Whether a folder's conversion.json tells of a merge of the adapter in these files."""
    record = readable_record(files)
    if "merge_lora" not in str(record.get("tensors")):
        return False
    sources = str(record.get("sources"))
    return any(str(found["sha256"]) in sources for found in identity(list(adapter)))


def _sound(added: Any) -> bool:
    """Whether the record of added rows and tokens has the form that the way back relies on."""
    if added is None:
        return True
    if not isinstance(added, dict):
        return False
    rows, tokens, tokenizer = added.get("rows"), added.get("tokens"), added.get("tokenizer")
    return (
        isinstance(rows, dict)
        and all(type(rows.get(end)) is int and 0 < rows[end] < 2**32 for end in ("from", "to"))
        and isinstance(tokens, list)
        and all(isinstance(t, dict) and type(t.get("id")) is int and isinstance(t.get("content"), str) for t in tokens)
        and isinstance(tokenizer, dict)
        and all(change is None or _undoes(change) for change in tokenizer.values())
    )


def _undoes(change: Any) -> bool:
    if not isinstance(change, dict):
        return False
    return isinstance(change.get("text"), str) or (
        isinstance(change.get("drop"), list) and isinstance(change.get("set"), dict)
    )
