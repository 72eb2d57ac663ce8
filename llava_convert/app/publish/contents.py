"""What of a folder is published, and whether it may be: only what is proven to be what was converted."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava_convert.app.card import CARD
from llava_convert.app.options import SourceOptions
from llava_convert.app.publish.secret_files import looks_secret
from llava_convert.app.verify import verify
from llava_convert.core.errors import InputError, MismatchError, UnsafeError, UsageError, unreadable
from llava_convert.core.progress import Reporter
from llava_convert.core.text import listed
from llava_convert.layouts.registry import open_checkpoint
from llava_convert.model.options import FULL, OFF
from llava_convert.model.record import RECORD, read_record
from llava_convert.storage.files import require_inside
from llava_convert.storage.fingerprints import Digest, digests
from llava_convert.storage.remote.files import WEIGHTS
from llava_convert.storage.sidecars import folder_sidecars

# Written after the verification, so not among the files that it vouches for.
_UNVOUCHED = frozenset({CARD, RECORD})

# Caches that the hubs' clients keep in folders, git's own, and what Python and file managers leave.
_LEFT_OUT = frozenset(
    {".cache", ".git", ".ms_upload_cache", ".ms_upload_progress", ".mdl", ".msc", ".mv", "__pycache__", ".DS_Store"}
)
_STAGING = ".partial"  # of an output that is not whole: .NAME.partial


def names(folder: Path, include: Collection[str] = ()) -> list[str]:
    """The regular files of a folder, by their path in it: what is published.

    Raises InputError; UnsafeError (exit 5) for a link that leaves the folder, unless it is a hub cache's own, and for
    what looks like a secret and is not named by `include`; UsageError where that names what is not there.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}", hint="give the folder of a model")
    wanted = [name for name in _entries(folder) if require_inside(folder, name).is_file()]
    if not wanted:
        raise InputError(f"{folder} holds nothing to publish", hint="give the folder of a model")
    if unknown := [name for name in include if name not in wanted]:
        raise UsageError(f"--include {unknown[0]}: {folder} has no such file", hint="name it by its path in the folder")
    if secret := [name for name in wanted if looks_secret(name) and name not in include]:
        raise UnsafeError(
            f"{folder} holds what looks like a secret: {listed(secret)}; nothing was sent",
            hint=f"move it out of the folder; or publish it by `llava-convert upload … --include {secret[0]}`",
        )
    return wanted


def _entries(folder: Path) -> list[str]:
    """All within a folder, links not entered, less what is left out. Raises InputError for a folder not readable."""

    def refuse(problem: OSError) -> None:
        raise unreadable(problem.filename, problem) from problem

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):  # rglob passes over what it may not list
        folders[:] = [name for name in folders if not _left_out(name)]
        found += [Path(place, name) for name in (*folders, *files) if not _left_out(name)]
    return [path.relative_to(folder).as_posix() for path in sorted(found)]


def _left_out(part: str) -> bool:
    return part in _LEFT_OUT or (part.startswith(".") and part.endswith(_STAGING))


def proven(
    folder: Path,
    say: Reporter,
    *,
    level: str = FULL,
    source: str | Path | None = None,
    options: SourceOptions | None = None,
    include: Collection[str] = (),
    known: Mapping[str, Digest] | None = None,
) -> Mapping[str, Digest]:
    """The files to publish with their digests, after they were proven to be what was converted.

    `known` are digests that somebody made before; those of files that changed since are made anew.

    By `source`, with which the weights are compared now; else by the sha256 that a conversion recorded when it verified
    in full. A folder without a record is someone else's: it has to open as a checkpoint. `level` off asks for nothing.

    Raises MismatchError (exit 7) for a difference, UsageError (exit 2) where nothing proves it, InputError (exit 3).
    """
    wanted = names(folder, include)
    if level not in (FULL, OFF):
        raise UsageError(f"--verify {level}: before a folder is published it is {FULL} or {OFF}")
    _check_card(folder)
    vouched: Mapping[str, Any] | None = None
    if level == OFF:
        say.warn(f"{folder} is published unverified (--verify {OFF})")
    elif source is not None:
        verify(source, folder, options, say).refuse()
    elif (record := read_record(folder_sidecars(folder))) is not None:
        vouched = _vouched(folder, record)
    else:
        opened, why = open_checkpoint(folder)
        say.note(f"{folder} is {opened.layout} ({why}); it has no {RECORD}, so there is nothing to compare it with")
    found = digests(folder, wanted, known)
    if vouched is not None:
        _compare(folder, found, vouched)
    return found


def _vouched(folder: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    verified = record.get("verified")
    files = verified.get("files") if isinstance(verified, dict) and verified.get("level") == FULL else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UsageError(
            f"{folder} was not verified in full when it was converted, and nothing else proves it",
            hint="--source SOURCE compares it now; --verify off publishes it as it is",
        )
    return files


def _compare(folder: Path, found: Mapping[str, Digest], vouched: Mapping[str, Any]) -> None:
    missing = [name for name in vouched if name not in found]
    changed = [
        name
        for name, entry in vouched.items()
        if name in found and found[name].as_json() != {key: entry.get(key) for key in ("size", "sha256")}
    ]
    foreign = [n for n in found if n not in vouched and n not in _UNVOUCHED and n.lower().endswith(WEIGHTS)]
    said = (("not there", missing), ("not as it was", changed), ("weights of another origin", foreign))
    problems = [f"{what}: {listed(which)}" for what, which in said if which]
    if problems:
        raise MismatchError(
            f"{folder} is not what was verified; {'; '.join(problems)}",
            hint="convert it again; or --source SOURCE compares it again, --verify off publishes it as it is",
        )


def _check_card(folder: Path) -> None:
    """The front matter has to parse, or the hub refuses the upload after all weights were sent. Offline."""
    import yaml
    from huggingface_hub import ModelCard

    card = folder / CARD
    if not card.is_file():
        return
    try:
        ModelCard(card.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(
            f"{card}: the metadata between its --- lines cannot be read: {first}", hint="fix it, since hubs refuse it"
        ) from problem
