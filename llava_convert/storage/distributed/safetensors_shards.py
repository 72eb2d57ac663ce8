"""torch.distributed.checkpoint in the form of Hugging Face: safetensors whose headers say where their parts belong.

`save_pretrained(distributed_checkpoint=True)` of transformers 5.23 and later, and torch's HuggingFaceStorageWriter
(torch 2.13, distributed/checkpoint/_hf_utils.py). `DCP_SHARDING_INFO` takes names to the offsets of parts, whose shapes
are those of the header. How large a whole tensor is stands nowhere: it ends where its last part does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import listed, printable
from llava_convert.storage.distributed.chunks import Budget, Chunk, put_together
from llava_convert.storage.files import require_inside
from llava_convert.storage.headers import Headers
from llava_convert.storage.json_files import parse_json

_SHARD = re.compile(r"shard-(\d{5})-model-\d{5}-of-\d{5}\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def is_shard(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None


def read_shards(
    folder: Path, names: Iterable[str], headers: Headers
) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """Every tensor of the shards of a folder, and the files.

    Raises InputError for a shard that is missing or says nothing of its parts, and for parts that do not fit; what
    reading a header raises.
    """
    shards = {int(match[1]): name for name in sorted(names) if (match := _SHARD.fullmatch(name))}
    lacking = sorted(set(range(1, max(shards) + 1)) - set(shards))
    if lacking:
        raise InputError(
            f"{folder}: the shards of {len(lacking)} ranks are missing: {listed([f'shard-{n:05d}' for n in lacking])}",
            hint="get the files of every rank, of one save",
        )
    parts: dict[str, list[Chunk]] = {}
    paths: list[Path] = []
    for name in shards.values():
        path = require_inside(folder, name)
        paths.append(path)
        header = headers.safetensors(path)
        told = header.metadata.get(_INFO)
        info: Any = parse_json(told.encode(), f"{path}: {_INFO}", unique_keys=True) if told is not None else None
        if not isinstance(info, dict):
            raise InputError(f"{path}: has no {_INFO}, so where its parts belong is not known")
        for tensor in header.tensors.values():
            parts.setdefault(tensor.name, []).append(Chunk(_offsets(info.get(tensor.name), tensor, path), tensor))
    budget = Budget()
    found: dict[str, StoredTensor] = {}
    for name, chunks in parts.items():
        ends = ([o + n for o, n in zip(c.offsets, c.shape, strict=True)] for c in chunks)
        shape = tuple(map(max, zip(*ends, strict=True)))
        found[name] = put_together(name, shape, chunks, folder, budget)
    return found, tuple(paths)


def _offsets(info: Any, tensor: StoredTensor, path: Path) -> tuple[int, ...]:
    found = info.get("saved_offsets") if isinstance(info, dict) else None
    sound = isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in found)
    if not sound or len(found or ()) != len(tensor.shape):
        raise InputError(f"{path}: {_INFO} gives {printable(tensor.name)} no sound offsets")
    return tuple(found or ())
