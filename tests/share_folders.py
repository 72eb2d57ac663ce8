"""torch's distributed checkpoints of a few tensors, written by hand with torch's own classes: any split of each."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

Parts = Sequence[tuple[tuple[int, ...], torch.Tensor]]


def cut(tensor: torch.Tensor, dim: int, pieces: int) -> Parts:
    """A tensor in pieces along one dimension, each with its offsets, as torch.chunk cuts it."""
    found, at = [], 0
    for piece in tensor.chunk(pieces, dim):
        found.append((tuple(at if d == dim else 0 for d in range(tensor.ndim)), piece.contiguous()))
        at += piece.shape[dim]
    return found


def write_classic(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Size, Parts]],
    *,
    paths: Mapping[str, tuple[str, ...]] | None = None,
    change: Callable[[Any], None] = lambda metadata: None,
) -> Path:
    """A checkpoint whose part i of each tensor lies in rank i's file; `change` alters the metadata at the end."""
    folder.mkdir(parents=True)
    files: dict[str, io.BytesIO] = {}
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, (size, parts) in tensors.items():
        chunks = [dcp.ChunkStorageMetadata(torch.Size(at), piece.shape) for at, piece in parts]
        properties = dcp.TensorProperties(dtype=parts[0][1].dtype)
        entries[name] = dcp.TensorStorageMetadata(properties, size, chunks)
        for rank, (at, piece) in enumerate(parts):
            file = files.setdefault(f"__{rank}_0.distcp", io.BytesIO())
            start = file.tell()
            alone = io.BytesIO()
            torch.save(piece, alone)
            file.write(alone.getvalue())
            index = dcp.MetadataIndex(name, torch.Size(at), rank)
            places[index] = _StorageInfo(f"__{rank}_0.distcp", start, file.tell() - start)
    metadata = dcp.Metadata(entries, planner_data=paths, storage_data=places)
    change(metadata)
    for name, file in files.items():
        (folder / name).write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder
