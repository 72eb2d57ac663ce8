"""Where a model comes from and what looked at it: files, conversion.json, versions, command. Reports tell it."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_convert._version import __version__
from llava_convert.core.flags import Flagged, Option, as_names, options_of
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import PART_NAMES, Checkpoint
from llava_convert.model.record import RECORD
from llava_convert.storage.fingerprints import identity
from llava_convert.storage.remote.mounts import remote_of
from llava_convert.storage.remote.origin import published
from llava_convert.storage.remote.session import Session

COMPUTING = ("llava-convert", "torch", "transformers", "xllamacpp")  # what an answer depends on first
_PACKAGES = (
    "torch", "transformers", "xllamacpp", "tokenizers", "safetensors", "numpy", "pillow", "accelerate", "bitsandbytes",
    "mlx-vlm", "llava-torch", "lmms-eval", "pandas",
)  # fmt: skip
_DIGITS = 16  # of a sha256 in a report
_READ = {"ends": "first and last MiB"}
_TIME = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True)
class Provenance:
    """Where a model lies, and what its files and its record say of how it came to be.

    `files` are its weights: name, size, and sha256 of a part of each (`fingerprints.identity`). `written` is when the
    last of them was, empty where that is not known. `made_of` are its base models and adapters, by role. `record` is
    its conversion.json, empty where there is none.
    """

    path: str
    layout: str
    files: tuple[Mapping[str, Any], ...]
    written: str
    published: Mapping[str, str]
    made_of: tuple[tuple[str, str], ...]
    record: Mapping[str, Any]

    def rows(self, source: Provenance | None = None) -> Iterator[tuple[str, str]]:
        """What is known, a line each: what it is, and its value. `source` is what it may have been converted from."""
        yield "path", self.path
        yield "layout", self.layout
        if self.published:
            yield "published as", " at ".join(self.published.values())
        yield "weights", "\n".join(map(_file, self.files))
        yield "last written", self.written or "not known"
        yield from self.made_of
        if not self.record:
            yield "record", f"no {RECORD} beside it"
            return
        yield from _recorded(self.record, source)


def provenance_of(every: Sequence[Checkpoint], session: Session) -> Provenance:
    """That of a model as its layout opened it; several where a folder has it in several types.

    Raises InputError for a file that cannot be read.
    """
    first = every[0]
    paths = sorted({path for one in every for tensor in one.tensors().values() for path in tensor.paths})
    local = [path.stat().st_mtime for path in paths if remote_of(path) is None]
    named = [(f"base {PART_NAMES[name]}", part.base) for name, part in first.parts.items() if part.base is not None]
    return Provenance(
        path=session.called(first.path),
        layout=first.layout,
        files=tuple(identity(paths)),
        written=datetime.fromtimestamp(max(local), UTC).strftime(_TIME) if local else "",
        published=published(first.root),
        made_of=(*named, *((layer.role, layer.asked) for layer in first.layers)),
        record=first.record or {},
    )


def _file(found: Mapping[str, Any]) -> str:
    what = _READ.get(str(found["of"]), found["of"])
    return f"{found['file']}: {found['size']:,} bytes, sha256 of its {what} {str(found['sha256'])[:_DIGITS]}…"


def _recorded(record: Mapping[str, Any], source: Provenance | None) -> Iterator[tuple[str, str]]:
    """What a conversion.json says, as far as it has the form that conversions write."""
    tool, ways = _dict(record.get("tool")), _dict(record.get("layout"))
    yield "converted by", f"{tool.get('name')} {tool.get('version')}, tables {tool.get('tables')}"
    yield "converted from", f"{ways.get('from')} to {ways.get('to')}"
    known = {(f["size"], f["sha256"]) for f in source.files} if source is not None else set()
    for place in _dicts(record.get("sources")):
        files = [f for f in _dicts(place.get("files")) if {"file", "size", "sha256", "of"} <= f.keys()]
        said = [" at ".join(str(place[key]) for key in ("repo", "commit") if key in place)] if "repo" in place else []
        for one in files:
            mark = ""
            if source is not None and place.get("role") == "source":
                mark = " (that of SOURCE)" if (one["size"], one["sha256"]) in known else " (not one of SOURCE's)"
            said.append(_file(one) + mark)
        yield f"made of its {place.get('role')}", "\n".join(said)
    options = _dict(record.get("options"))
    yield "options", ", ".join(f"{name} {value}" for name, value in options.items() if value is not None) or "none"
    yield "checked when written", str(_dict(record.get("verified")).get("level"))
    tensors = _dict(record.get("tensors"))
    digests = sum("xxh3_128" in _dict(one) for one in tensors.values())
    yield "digests of tensors", f"{digests} of {len(tensors)} (xxh3-128)" if digests else "none (--digest records them)"


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def versions() -> dict[str, str]:
    """The versions of what computes here, by name: Python, this package, and those of its peers that are installed."""
    found = {"llava-convert": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "system": f"{platform.system()} {platform.machine()}"}


@dataclass(frozen=True)
class Made:
    """By what a report was made: the command, when, and the versions of what computed."""

    command: str
    date: str
    versions: Mapping[str, str]

    @classmethod
    def now(cls, command: str) -> Made:
        return cls(command, datetime.now(UTC).strftime(_TIME), versions())


def command_of(name: str, job: Flagged) -> str:
    """The command line that does a job again, whether it was typed or called from Python."""
    words = ["llava-convert", *name.split()]
    options = options_of(type(job))
    for option in sorted(options.values(), key=lambda option: not option.flag.argument):
        value = getattr(job, option.name)
        if value is not None and value != option.default:
            words += _words(option, value)
    return shlex.join(words)


def _words(option: Option, value: Any) -> list[str]:
    if option.flag.argument and not option.flag.repeated:
        return [",".join(as_names(value)) if isinstance(value, list | tuple) else str(value)]
    if option.is_switch:
        return [option.spelling]
    if isinstance(value, Mapping):
        value = ",".join(f"{key}={one}" for key, one in value.items())
    values = as_names(value if isinstance(value, str | Path | list | tuple) else str(value))
    return [word for one in values for word in ((one,) if option.flag.argument else (option.spelling, one))]
