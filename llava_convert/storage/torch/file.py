"""Reads what torch.save writes, by its headers: the tree of the pickle, where each tensor's bytes are, the weights.

Neither torch nor the classes that a file names are imported; no weight is read. The two forms of such a file are in
`torch_zip` and `torch_legacy`, tensors in `torch_tensors`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError, unreadable
from llava_convert.core.tensors import StoredTensor, require_few
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.files import open_regular, size_of
from llava_convert.storage.pickle.machine import Inert
from llava_convert.storage.torch.legacy import read_legacy
from llava_convert.storage.torch.tensors import OddTensor
from llava_convert.storage.torch.zip import read_zip

__all__ = ["OddTensor", "StateDict", "TorchFile", "read_torch", "state_dict"]

_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_MAX_PREFIXES = 8  # real files have up to two; each costs a pass over all names


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What torch.save wrote. `root` is the tree (see unpickle.load) with StoredTensor and OddTensor as its tensors.

    `stubs` are the names of the globals that were read as inert; `byteorder` is always "little".
    """

    path: Path
    root: Any
    stubs: tuple[str, ...]
    byteorder: str


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a file in its order; the wrappers taken off; the entries that are no tensors."""

    tensors: dict[str, StoredTensor]
    unwrapped: tuple[str, ...]
    ignored: tuple[str, ...]


def read_torch(path: Path) -> TorchFile:
    """The tree of a file that torch.save wrote, in either format, with every tensor located and none read.

    Raises InputError (not a regular file, truncated, corrupt, another format), UnsupportedError (TAR, TorchScript,
    big-endian), UnsafeError (code, bombs, names that leave the archive: fault rows 35, 36, 39).
    """
    with open_regular(path) as stream:
        try:
            size = size_of(stream)
            head = stream.read(512)
            if head.startswith(b"PK"):
                loaded = read_zip(path, stream, size)
            else:
                _refuse_other_formats(path, head)
                loaded = read_legacy(path, stream, size)
        except OSError as error:
            raise unreadable(path, error) from error
    return TorchFile(path, loaded.root, loaded.stubs, "little")


def state_dict(file: TorchFile) -> StateDict:
    """The weights of `file`: without its wrappers and prefixes, each told in `unwrapped` (fault row 43).

    Wrappers are the keys `state_dict`, `model` and `module`, taken off while no tensor lies beside them; prefixes are
    `module.` and `_orig_mod.`, taken off while every key has them. Both say so in `unwrapped` ("module", "module.").

    Raises InputError where there is no tensor, UnsupportedError for a whole pickled module or a tensor of an odd kind.
    """
    unwrapped: list[str] = []
    level = _entries(file.root)
    if level is None:
        raise UnsupportedError(
            f"{file.path}: holds {_describe(file.root)}, not a state dict",
            hint="save the weights alone where its code is: "
            f"python -c \"import torch; m = torch.load('{file.path.name}', map_location='cpu', weights_only=False); "
            "torch.save(m.state_dict(), 'weights.pth')\"; then give weights.pth, with the folder of its config by "
            "--config-from",
        )
    while not _holds_tensors(level) and len(unwrapped) < 4:  # objects may be cyclic
        inner = {key: _entries(level.get(key)) for key in ("state_dict", "model", "module")}
        key = next((key for key, entries in inner.items() if entries), None)
        if key is None:
            break
        unwrapped.append(key)
        level = inner[key] or {}
    names = {key: value for key, value in level.items() if isinstance(key, str)}
    tensors: dict[str, StoredTensor] = {}
    ignored = [key if isinstance(key, str) else f"<key of type {type(key).__name__}>" for key in level]
    ignored = [key for key in ignored if not isinstance(names.get(key), StoredTensor)]
    for key, value in names.items():
        if isinstance(value, OddTensor):
            raise UnsupportedError(f"{file.path}: tensor {printable(key)} is of a kind that is not read: {value.kind}")
        if isinstance(value, StoredTensor):
            tensors[key] = value
    require_few(printable(file.path), len(tensors))
    if not tensors:
        raise InputError(
            f"{file.path}: holds no tensor where a state dict is expected; found {_describe(level)}",
            hint="is it a checkpoint of weights, and was the model saved with it?",
        )
    for _ in range(_MAX_PREFIXES):
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) and key != p for key in tensors)), "")
        if not prefix:
            break
        tensors = {key[len(prefix) :]: tensor.renamed(key[len(prefix) :]) for key, tensor in tensors.items()}
        unwrapped.append(prefix)
    return StateDict(tensors, tuple(unwrapped), tuple(ignored))


def _holds_tensors(level: dict[Any, Any]) -> bool:
    return any(isinstance(value, StoredTensor | OddTensor) for value in level.values())


def _entries(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Inert) and value.args is not None:
        return value.mapping
    return value if isinstance(value, dict) else None


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = [printable(str(key)) if isinstance(key, str | int) else "…" for key in list(value)[:8]]
        return f"the keys {', '.join(keys)}" if keys else "an empty dict"
    return f"an object of {printable(value.name)}" if isinstance(value, Inert) else f"a {type(value).__name__}"


def _refuse_other_formats(path: Path, head: bytes) -> None:
    if not head:
        raise InputError(f"{path}: empty file", hint="the save or download did not finish: make it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights", hint="git lfs pull")
    if head.lstrip()[:1] in (b"<", b"{") and not head.startswith(b"\x80"):
        raise InputError(
            f"{path}: looks like a web page or an error message saved as weights", hint="download the file again"
        )
    if head[257:262] == b"ustar":
        raise UnsupportedError(
            f"{path}: is in the TAR format of PyTorch before 0.4, which is not read",
            hint="if you trust the file, save it again: python -c \"import torch; torch.save(torch.load('OLD', "
            "map_location='cpu', weights_only=False), 'NEW')\"",
        )
    if head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < 1 << 40:
        raise InputError(f"{path}: is a safetensors file under another name", hint="rename it to end in .safetensors")
