"""Tensors of a folder that a real tool wrote, read by the libraries and not by the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, subfolders included: `projector/model.0.weight`."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = file.parent.relative_to(folder).as_posix()
        found |= {name if prefix == "." else f"{prefix}/{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted([*folder.rglob("pytorch_model*.bin"), *folder.rglob("adapter_model.bin")]):
        prefix = file.parent.relative_to(folder).as_posix()
        state = torch.load(file, weights_only=True)
        found |= {name if prefix == "." else f"{prefix}/{name}": tensor for name, tensor in state.items()}
    return found


def assert_same_weights(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, rows: int | None = None
) -> None:
    """Bit for bit once theirs is cast to our dtype; of vocabulary tensors only the first `rows` rows."""
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    assert not missing and not extra, f"missing {missing[:5]}, extra {extra[:5]}"
    for name, wanted in theirs.items():
        found = ours[name]
        if rows is not None and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            found, wanted = found[:rows], wanted[:rows]
        assert found.shape == wanted.shape, name
        wanted = wanted.to(found.dtype)
        unequal = int((found.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        assert unequal == 0, f"{name}: {unequal} bytes differ, by up to {(found - wanted).abs().max()}"
