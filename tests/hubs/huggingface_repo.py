"""What the Hugging Face double keeps: repositories of branches, which point to commits, which hold files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.hubs.loopback import Blob, size_of

# What the .gitattributes of a new repository sends through LFS, as far as models go.
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".model", ".onnx", ".zip")
LFS_BYTES = 10 * 1000 * 1000


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES)


@dataclass
class Repo:
    """Branches point to commits, commits hold files."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, Blob], message: str = "") -> str:
        """A new commit on a branch, which is made where it is not there yet."""
        listing = repr((branch, len(self.commits), [(name, size_of(blob)) for name, blob in sorted(files.items())]))
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.messages[sha] = dict(files), message
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches[revision]]
