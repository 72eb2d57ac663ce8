"""A checkpoint that several processes saved, damaged in every way: what the command says, and its exit code."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

import llava_convert
from tests.faults.corpus import accepted, refused
from tests.share_folders import cut, write_classic

HEAD = "language_model.lm_head.weight"
EYES = "vision_tower.vision_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shares") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out)
    return out


def saved(model: Path, folder: Path, change: Callable[[Any], None] = lambda metadata: None) -> Path:
    """The model as two ranks save it, half of the rows each; `change` is done to the metadata."""
    out = shutil.copytree(model, folder / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(model / "model.safetensors")
    tensors = {name: (tensor.shape, cut(tensor, 0, 2 if tensor.ndim else 1)) for name, tensor in state.items()}
    write_classic(out / "pytorch_model_fsdp_0", tensors, change=change)
    return out


def entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata[HEAD]


def key(metadata: Any, rank: int) -> MetadataIndex:
    """Where part `rank` of the head is looked up."""
    found = entry(metadata).chunks[rank]
    return MetadataIndex(HEAD, found.offsets, rank)


def place(metadata: Any, rank: int) -> Any:
    return metadata.storage_data[key(metadata, rank)]


def wrong_offset(metadata: Any) -> None:
    place(metadata, 1).offset += 64


def outside_the_file(metadata: Any) -> None:
    place(metadata, 1).offset = 1 << 40


def overlapping(metadata: Any) -> None:
    at, found = key(metadata, 1), entry(metadata).chunks[1]
    moved = torch.Size([found.offsets[0] - 1, 0])
    metadata.storage_data[MetadataIndex(HEAD, moved, 1)] = metadata.storage_data.pop(at)
    entry(metadata).chunks[1] = ChunkStorageMetadata(moved, found.sizes)


def a_gap(metadata: Any) -> None:
    del entry(metadata).chunks[1]


def unplaced(metadata: Any) -> None:
    del metadata.storage_data[key(metadata, 1)]


def wrong_type(metadata: Any) -> None:
    entry(metadata).properties = TensorProperties(dtype=torch.float32)


def wrong_shape(metadata: Any) -> None:
    found = entry(metadata).chunks[1]
    entry(metadata).chunks[1] = ChunkStorageMetadata(found.offsets, torch.Size([found.sizes[0], found.sizes[1] + 8]))


def another_tensor(metadata: Any) -> None:
    metadata.storage_data[key(metadata, 1)] = metadata.storage_data[MetadataIndex(EYES, torch.Size([0, 0]), 0)]


def leads_out(metadata: Any) -> None:
    place(metadata, 0).relative_path = "../../secret"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (wrong_offset, 3, "__1_0.distcp"),
        (outside_the_file, 3, f"__1_0.distcp: truncated: {HEAD} ends at byte"),
        (overlapping, 3, f"{HEAD}: none of its parts holds index|{HEAD}: its parts overlap"),
        (a_gap, 3, f"{HEAD}: 18,432 of its 36,864 elements are there: a rank's part is missing"),
        (unplaced, 3, f"does not say which file holds {HEAD} at [288, 0]"),
        (wrong_type, 3, f"{HEAD} at [0, 0]: F32 by the metadata, F16 in __0_0.distcp"),
        (wrong_shape, 3, f"{HEAD} at [288, 0]: [288, 72] by the metadata, [288, 64] in __1_0.distcp"),
        (another_tensor, 3, f"{HEAD} at [288, 0]: [288, 64] by the metadata, [9, 32] in "),
        (leads_out, 5, "not a file of this folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_metadata_that_are_wrong(
    model: Path, tmp_path: Path, change: Callable[[Any], None], code: int, said: str
) -> None:
    folder = saved(model, tmp_path, change)
    ran = refused(tmp_path, code, args=("convert", folder, "--to", "official", "-o", tmp_path / "out"))
    assert any(one in ran.stderr for one in said.split("|")), ran.stderr
    assert "→" in ran.stderr  # what to do


def test_a_rank_without_its_file(model: Path, tmp_path: Path) -> None:
    folder = saved(model, tmp_path)
    (folder / "pytorch_model_fsdp_0" / "__1_0.distcp").unlink()
    refused(tmp_path, 3, "__1_0.distcp: no such file", args=("convert", folder, "--to", "gguf", "-o", tmp_path / "o"))


def test_a_rank_that_is_cut(model: Path, tmp_path: Path) -> None:
    folder = saved(model, tmp_path)
    file = folder / "pytorch_model_fsdp_0" / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 100)
    refused(tmp_path, 3, "__1_0.distcp: truncated: ", args=("convert", folder, "--to", "hf", "-o", tmp_path / "out"))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hurt",)


def test_metadata_that_would_run_code(model: Path, tmp_path: Path) -> None:
    folder = saved(model, tmp_path)
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    refused(tmp_path, 5, "which can run code", args=("convert", folder, "--to", "hf", "-o", tmp_path / "out"))


def test_a_part_that_is_there_twice(model: Path, tmp_path: Path) -> None:
    """As ranks save what each of them holds: it counts once."""
    folder = saved(model, tmp_path, lambda metadata: entry(metadata).chunks.append(entry(metadata).chunks[0]))
    accepted("convert", folder, "--to", "official", "-o", tmp_path / "out")
    assert llava_convert.verify(model, tmp_path / "out")
