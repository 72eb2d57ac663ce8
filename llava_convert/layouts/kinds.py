"""What a path is that no layout opens: looked up in one table, by keys, configs and first bytes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_convert.core.errors import ConvertError, InputError, UnsupportedError
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Found
from llava_convert.model.tables.kinds import FILE, FOLDER, Kind, kinds
from llava_convert.storage.files import open_regular, read_fully
from llava_convert.storage.json_files import MAX_JSON_BYTES, parse_json
from llava_convert.storage.pickle.globals import Inert
from llava_convert.storage.safetensors import SUFFIX

_TORCH = (".bin", ".pth", ".pt", ".ckpt", ".tar")
_JSON = (".json", ".jsonl")
_FILES_LOOKED_AT = 4  # of weights, in a folder: enough to tell what it holds
_HEAD = 1 << 20  # bytes of a list of objects in which the first of them ends


@dataclass(frozen=True)
class Known:
    """What a thing is, what it can be used for, and the command to type next.

    `weights`: it is a file of weights, which is a model once the config of its model lies beside it.
    """

    kind: str
    what: str
    use: str
    next: str
    weights: bool = False


class Told(ConvertError):
    """A path that is no checkpoint, and that a row of the table of kinds knows (`known`)."""

    def __init__(self, path: Path, known: Known) -> None:
        super().__init__(f"{path} is {known.what}: {known.use}", hint=f"`{known.next}`")
        self.path, self.known = path, known


class NotAModelError(Told, UnsupportedError):
    """Something else than a model (exit 4)."""


class IncompleteError(Told, InputError):
    """A model that lacks its weights (exit 3)."""


@dataclass(frozen=True)
class Seen:
    """The evidence of one path. What cannot be read is as if it were not there."""

    found: Found

    @property
    def path(self) -> Path:
        return self.found.path

    @cached_property
    def place(self) -> str:
        return FOLDER if self.path.is_dir() else FILE

    @property
    def names(self) -> frozenset[str]:
        return self.found.names

    @cached_property
    def suffix(self) -> str:
        return "" if self.place == FOLDER else self.path.suffix.lower()

    @cached_property
    def start(self) -> bytes:
        if self.place == FOLDER:
            return b""
        with suppress(ConvertError, OSError):
            return self.found.headers.start(self.path)
        return b""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        if self.place == FOLDER:
            return self.found.config or {}
        found: Any = None
        if self.suffix in _JSON and self.start.lstrip()[:1] == b"{":
            with suppress(ConvertError, OSError):
                found = parse_json(self._bytes(MAX_JSON_BYTES), str(self.path))
        return found if isinstance(found, dict) else {}

    @cached_property
    def item(self) -> Mapping[str, Any]:
        """The first object of a JSON list, or of a file with one a line, however long the file is."""
        if self.suffix not in _JSON:
            return {}
        with suppress(ConvertError, OSError, ValueError):
            text = self._bytes(_HEAD).decode("utf-8", "replace").lstrip()
            if text[:1] == "[" or self.suffix == ".jsonl":
                found, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
                return found if isinstance(found, dict) else {}
        return {}

    def _bytes(self, limit: int) -> bytes:
        with open_regular(self.path) as stream:
            return read_fully(stream, limit, self.path)

    @cached_property
    def tensors(self) -> frozenset[str]:
        if self.place == FILE:
            return frozenset(self._tensors(self.path))
        files = sorted(name for name in self.names if name.lower().endswith((SUFFIX, *_TORCH)))
        return frozenset(name for file in files[:_FILES_LOOKED_AT] for name in self._tensors(self.path / file))

    def _tensors(self, path: Path) -> Iterable[str]:
        with suppress(ConvertError, OSError):
            if path.suffix.lower() == SUFFIX:
                return self.found.headers.safetensors(path).tensors
            if path.suffix.lower() in _TORCH:
                from llava_convert.storage.torch.file import state_dict  # most paths are no torch file

                return state_dict(self.found.headers.torch(path)).tensors
        return ()

    @cached_property
    def pickled(self) -> frozenset[str]:
        if self.place == FILE and self.suffix in _TORCH:
            with suppress(ConvertError, OSError):
                file = self.found.headers.torch(self.path)
                keys = map(str, file.root) if isinstance(file.root, dict) else ()
                return frozenset((*keys, *file.stubs))
        return frozenset()

    @cached_property
    def objects(self) -> frozenset[str]:
        if self.place == FILE and self.suffix in _TORCH:
            with suppress(ConvertError, OSError):
                root = self.found.headers.torch(self.path).root
                return frozenset({root.name} if isinstance(root, Inert) else ())
        return frozenset()

    def newest(self, pattern: str) -> str | None:
        fitting = [name for name in self.names if Path(name).match(pattern)]
        return max(fitting, key=lambda name: (_number(name), _changed(self.path / name)), default=None)


def _number(name: str) -> int:
    numbers = re.findall(r"\d{1,12}", name)
    return int(numbers[-1]) if numbers else -1


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def known(found: Found) -> Known | None:
    """What a path is by the first row that fits it, None where none does."""
    seen = Seen(found)
    kind = next((row for row in kinds() if row.fits(seen)), None)
    return None if kind is None else _filled(kind, seen)


def _filled(kind: Kind, seen: Seen) -> Known:
    classes = seen.config.get("architectures")
    model = seen.config.get("model_type") or (classes[0] if isinstance(classes, list) and classes else "unknown")
    inner = (kind.inner and seen.newest(kind.inner)) or ""
    words = {"model": printable(model), "path": seen.path, "parent": seen.path.parent, "inner": seen.path / inner}
    quoted = {word: shlex.quote(str(value)) for word, value in words.items()}
    plain = {word: str(value) for word, value in words.items()} | {"inner": inner}
    texts = [text.format(**plain) for text in (kind.what, kind.use)]
    return Known(kind.name, texts[0], texts[1], kind.next.format(**quoted), kind.weights)


def refusal(found: Found) -> UnsupportedError:
    """What to say of a path that no layout claims: by the table, else what was seen of it."""
    told = known(found)
    if told is not None:
        return NotAModelError(found.path, told)
    hint = "`llava-convert layouts` lists what is read; give a checkpoint, its folder, or the folder of its training"
    return UnsupportedError(f"{found.path} is not a model that this tool knows: {_seen(Seen(found))}", hint=hint)


def _seen(seen: Seen) -> str:
    if seen.place == FOLDER:
        if seen.found.config is not None:
            return f"its config.json is that of a {printable(seen.found.config.get('model_type'))}"
        return f"the folder holds {listed(sorted(seen.names), 4)}" if seen.names else "the folder is empty"
    if seen.tensors:
        return f"a file of {len(seen.tensors):,} tensors, such as {listed(sorted(seen.tensors), 3)}"
    text = seen.start[:24].decode("latin-1")
    return f"a file that begins with '{printable(text)}'" if text else "the file is empty"
