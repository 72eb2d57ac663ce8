"""What every layout module offers, and the options they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol

from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.target import Target
from llava_convert.storage.headers import Headers
from llava_convert.storage.sidecars import Sidecars


@dataclass(frozen=True)
class OpenOptions:
    """How to read a source.

    `config` is the training config to read instead of the one it carries; `dequantize` says that quantised weights may
    be made floats of. `mmproj` is the file with vision tower and projector of a GGUF, where the user named it.
    """

    config: Path | None = None
    dequantize: bool = False
    mmproj: Path | None = None


@dataclass(frozen=True)
class Needs:
    """What a target needs of the model: parts whose weights, whose configs, and whose configs if to be had.

    `keep_added`: rows and tokens which an earlier conversion added stay.
    """

    weights: tuple[str, ...]
    configs: tuple[str, ...] = ()
    optional_configs: tuple[str, ...] = ()
    keep_added: bool = False


@dataclass(frozen=True)
class Found:
    """A path looked at once, for all layouts to judge: its config.json, and the names in it.

    What a layout reads to judge is kept in `beside`, the small files of its folder, and `headers`: it is there when the
    path is opened. The small files may be those of another folder, where `path` has none. `file` is the one file, or
    index, of the folder that holds the weights, where the user named that. `notes` are on how it was found.
    """

    path: Path
    config: Mapping[str, Any] | None
    names: frozenset[str]
    beside: Sidecars
    headers: Headers = field(default_factory=Headers)
    file: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> Path:
        """Where the weights are: a file, an index or a folder."""
        return self.file or self.path

    @property
    def root(self) -> Path:
        """The folder that the files are of."""
        return self.path if self.path.is_dir() else self.path.parent


class Layout(Protocol):
    """A layout module. `detect` says why a path is of this layout, or None when it is not; `open` gets what it read."""

    NAME: str

    def detect(self, found: Found) -> str | None: ...

    def open(self, found: Found, options: OpenOptions) -> Checkpoint: ...

    def needs(self, checkpoint: Checkpoint, part: str) -> Needs: ...

    def lower(self, model: Model, options: TargetOptions) -> Target: ...
