"""Weights that several processes saved, each its share: recognised by the names of files, read without torch.

`torch.distributed.checkpoint` in its own form (`classic`) and in that of Hugging Face (`safetensors_shards`), one
torch file a rank (`ranks`), and DeepSpeed's folders (`storage.zero`). Each gives tensors whose extents lie in several
files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.storage.distributed import classic, ranks, safetensors_shards
from llava_convert.storage.headers import Headers
from llava_convert.storage.zero.folder import LATEST
from llava_convert.storage.zero.folder import recognise as recognise_zero

# Where accelerate's FSDP puts the model within a checkpoint (accelerate/utils/fsdp_utils.py, `save_fsdp_model`).
ACCELERATE_FOLDER = "pytorch_model_fsdp_0"


@dataclass(frozen=True, slots=True)
class Distributed:
    """The whole tensors of all shares by name, and the files that they lie in."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()


def recognise(folder: Path, names: Iterable[str]) -> str | None:
    """What the files of a folder make, in words; None where they are no shares of one model."""
    every = frozenset(names)
    if classic.METADATA in every or (ACCELERATE_FOLDER in every and (folder / ACCELERATE_FOLDER).is_dir()):
        return "a distributed checkpoint of torch"
    if any(map(safetensors_shards.is_shard, every)):
        return "a distributed checkpoint of torch, in safetensors"
    if any(map(ranks.is_rank, every)):
        return "one file of weights for each rank"
    if recognise_zero(every) or (LATEST in every and any(name.startswith("global_step") for name in every)):
        return "a DeepSpeed folder"
    return None


def read_distributed(folder: Path, names: Iterable[str], headers: Headers) -> Distributed:
    """The tensors of a folder that `recognise` knows; no weight is read, and nothing that a pickle names is called.

    Raises InputError for shares that are missing, damaged or do not make up the tensors; UnsupportedError for tensors
    that were split in ways that are not read; UnsafeError for a pickle that would run code, and names that leave the
    folder.
    """
    every = frozenset(names)
    return headers.once(folder, "shares", lambda folder: _read(folder, every, headers))


def _read(folder: Path, every: frozenset[str], headers: Headers) -> Distributed:
    if classic.METADATA in every:
        return _classic(folder)
    if ACCELERATE_FOLDER in every:
        return _classic(folder / ACCELERATE_FOLDER)
    if any(map(safetensors_shards.is_shard, every)):
        return Distributed(*safetensors_shards.read_shards(folder, every, headers))
    if any(map(ranks.is_rank, every)):
        found = ranks.read_ranks(folder, every, headers)
        return Distributed(found.tensors, found.files, stubs=found.stubs)
    return _zero(folder)


def _classic(folder: Path) -> Distributed:
    found = classic.read_classic(folder)
    left = [f"left out what is not the model's: {found.left} entries of the optimizer and the like"]
    return Distributed(found.tensors, found.files, tuple(left if found.left else ()), stubs=found.stubs)


def _zero(folder: Path) -> Distributed:
    from llava_convert.storage.torch.file import TorchFile, state_dict
    from llava_convert.storage.zero.checkpoint import read_zero

    zero = read_zero(folder)
    state = state_dict(TorchFile(folder, zero.tensors, zero.stubs, "little"))
    return Distributed(state.tensors, zero.files, zero.notes, zero.warnings, zero.stubs)
