"""The small files beside the weights of a part: tokenizer, generation config, image processor.

Most layouts have them in a folder. A GGUF has none: what they say stands in its metadata, and they are made of it when
one is first asked for. Readers see one thing for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llava_convert.core.errors import InputError, unreadable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import read_file, require_inside
from llava_convert.storage.fingerprints import State, states_in
from llava_convert.storage.json_files import MAX_JSON_BYTES, json_bytes, parse_json

# What lies beside weights: configs, vocabularies, templates, cards, and a training's config.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sidecars:
    """Files by name. `where` is the folder or file that they are of, for messages; `list_names` and `load` find them.

    Each file is read once and kept as long as this is: outputs hold most of them as they are. `before` is what the
    files of the folder, those of weights too, were before anything was read.
    """

    where: Path
    list_names: Callable[[], frozenset[str]]
    load: Callable[[str], bytes]
    in_folder: bool = False
    before: Mapping[Path, State] = field(default_factory=dict, repr=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def names(self) -> frozenset[str]:
        return self.list_names()

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.where / name).is_file() if self.in_folder else name in self.names()

    def read(self, name: str) -> bytes:
        """The bytes of a file that is there.

        Raises InputError where it cannot be read, or is no file of its kind; UnsafeError where it leads elsewhere.
        """
        return self.once(name, lambda: self.load(name))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives of these files, which is called when it is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def read_json(self, name: str) -> Any:
        """The value in a JSON file. Raises InputError where it is not JSON."""
        return parse_json(self.read(name), str(self.place(name)))

    def read_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises InputError where it is not JSON, or holds something else."""
        found = self.read_json(name)
        if not isinstance(found, dict):
            raise InputError(f"{self.place(name)}: expected a JSON object, found {type(found).__name__}")
        return found

    def was_read(self) -> list[Path]:
        """The files that were read."""
        return [self.where / key for key in self._kept if isinstance(key, str)]

    def place(self, name: str) -> Path:
        """What messages call a file."""
        return self.where / name


def folder_sidecars(folder: Path) -> Sidecars:
    """The files of a folder, as they are when they are first read.

    They are held to the rule of weights: to read a link that leaves the folder raises UnsafeError (`require_inside`).
    """

    def names() -> frozenset[str]:
        return frozenset(path.name for path in folder.iterdir() if path.is_file())

    def load(name: str) -> bytes:
        path = require_inside(folder, name)
        return json_bytes(path) if name.endswith(".json") else read_file(path, MAX_JSON_BYTES)

    return Sidecars(folder, names, load, in_folder=True, before=states_in(folder))


def refuse_links_out(folder: Path) -> None:
    """Raise UnsafeError for a small file of a model's folder that is a link out of it, whether or not a job reads it.

    So what is refused does not depend on the target. Folders in it are looked through, too, not those in these. Raises
    InputError where one cannot be listed.
    """
    for name in sorted(_links(folder)):
        require_inside(folder, name)


def _links(folder: Path) -> list[str]:
    found: list[str] = []
    try:
        inner = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        for name in ("", *inner):
            with os.scandir(folder / name) as entries:
                links = (entry.name for entry in entries if entry.name.endswith(_SUFFIXES) and entry.is_symlink())
                found += [f"{name}/{link}" if name else link for link in links]
    except OSError as error:
        raise unreadable(folder, error, "cannot be listed") from error
    return found


def made_sidecars(where: Path, make: Callable[[], Mapping[str, bytes]]) -> Sidecars:
    """Files that do not lie anywhere: `make` gives them all, and is called when one is first asked for."""
    made = cache(make)
    return Sidecars(where, lambda: frozenset(made()), lambda name: made()[name])
