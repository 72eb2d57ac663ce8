"""The headers of files, each read once: what a look at a source has read is there when it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_convert.storage.files import open_regular, read_fully
from llava_convert.storage.safetensors import SafetensorsFile, read_header

if TYPE_CHECKING:
    from llava_convert.storage.gguf.file import Gguf
    from llava_convert.storage.torch.file import TorchFile

START = 512  # bytes, which tell what a file is: a tar archive says so at its 257th

T = TypeVar("T")


class Headers:
    """What the files of one source begin with, by path. Each method raises what its reader raises."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, str], Any] = {}
        self._vocabularies: list[Any] = []  # of GGUF files

    def start(self, path: Path) -> bytes:
        """The first bytes of a file, START of them where it has as many."""

        def read(path: Path) -> bytes:
            with open_regular(path) as stream:
                return read_fully(stream, START, path)

        return self.once(path, "start", read)

    def safetensors(self, path: Path) -> SafetensorsFile:
        return self.once(path, "safetensors", read_header)

    def torch(self, path: Path) -> TorchFile:
        from llava_convert.storage.torch.file import read_torch  # most sources have no torch file

        return self.once(path, "torch", read_torch)

    def gguf(self, path: Path) -> Gguf:
        """The whole model of which `path` is a part, or the first of several."""
        from llava_convert.storage.gguf.file import open_gguf

        return self.once(path, "gguf", lambda path: open_gguf(path, self._vocabularies))

    def once(self, path: Path, kind: str, read: Callable[[Path], T]) -> T:
        """What `read` found at `path` when it was first asked for it."""
        if (path, kind) not in self._read:
            self._read[path, kind] = read(path)
        found: T = self._read[path, kind]
        return found
