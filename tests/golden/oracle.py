"""Tensors of a folder that a real tool wrote, read by the libraries and not by the package; and exact merges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.golden.zero_oracle import load_states

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    """Every tensor of a folder, subfolders included: `projector/model.0.weight`."""
    found: Tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = file.parent.relative_to(folder).as_posix()
        found |= {name if prefix == "." else f"{prefix}/{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted([*folder.rglob("pytorch_model*.bin"), *folder.rglob("adapter_model.bin")]):
        prefix = file.parent.relative_to(folder).as_posix()
        state = torch.load(file, weights_only=True)
        found |= {name if prefix == "." else f"{prefix}/{name}": tensor for name, tensor in state.items()}
    return found


@dataclass(frozen=True)
class Merges:
    """The LoRA of a `.pth` and the bases it belongs to, as stored; `alphas` are all that its config names."""

    trained: Tensors
    bases: dict[str, Tensors]
    alphas: Sequence[int] = (16,)
    rslora: bool = False

    @property
    def elements(self) -> int:
        """Of all tensors that have LoRA."""
        pairs = [
            (a, self.trained[name.replace("lora_A", "lora_B")]) for name, a in self.trained.items() if "lora_A" in name
        ]
        return sum(len(b) * a[0].numel() for a, b in pairs)

    def exact(self, name: str, near: Any) -> Any:
        """The merged tensor of that name, in official's or transformers' layout; None where it has no LoRA.

        In long doubles (64 bits of significand), from the raw tensors. Of several alphas, by that which comes nearest.
        """
        tower = "vision_tower." in name
        own = name.rpartition("vision_tower.")[2] if tower else name.removeprefix("language_model.")
        module = f"{'visual_encoder' if tower else 'llm'}.base_model.model.{own.removesuffix('.weight')}"
        a, b = (self.trained.get(f"{module}.lora_{side}.default.weight") for side in "AB")
        if a is None or b is None:
            return None
        base, rank = _long(self.bases["vit" if tower else "llm"][own]), len(a)
        product = _long(b.flatten(1)) @ _long(a.flatten(1))
        found = []
        for alpha in self.alphas:
            merged = base + (product * (alpha / (rank**0.5 if self.rslora else rank))).reshape(base.shape)
            magnitude = self.trained.get(f"{module}.lora_magnitude_vector.default.weight")
            if magnitude is not None:
                merged *= (_long(magnitude) / np.sqrt((merged**2).sum(1)))[:, None]
            found.append(merged)
        return min(found, key=lambda merged: np.abs(merged - near).max())


def merges(pth: Path, bases: Path, settings: str = "") -> Merges:
    """Of a checkpoint and the folder of its `llm/` and `vit/`; `settings` are its LoRA configs as text."""
    numbers = re.findall(r"(?:lora_alpha=|: )(\d+)", settings)
    alphas = tuple(sorted({int(number) for number in numbers})) or (16,)
    trained = load_states(pth)["state_dict"]
    return Merges(trained, {part: load(bases / part) for part in ("llm", "vit")}, alphas, "use_rslora=True" in settings)


def _long(values: torch.Tensor) -> Any:
    return values.detach().double().numpy().astype(np.longdouble)


@dataclass
class Counts:
    """Elements of merged tensors: all of them, and those where ours is not theirs but nearer to the exact merge."""

    merged: int = 0
    nearer: int = 0


def assert_same_weights(
    ours: Tensors, theirs: Tensors, *, rows: int | None = None, merges: Merges | None = None
) -> Counts:
    """Bit for bit once theirs is cast to our dtype; of vocabulary tensors only the first `rows` rows.

    With `merges`, an element of a merged tensor may differ where ours is the one nearer to the exact merge.
    """
    counts = Counts()
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    assert not missing and not extra, f"missing {missing[:5]}, extra {extra[:5]}"
    for name, wanted in theirs.items():
        found = ours[name]
        if rows is not None and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            found, wanted = found[:rows], wanted[:rows]
        assert found.shape == wanted.shape, name
        wanted = _cast(wanted, found.dtype)
        exact = None if merges is None else merges.exact(name, _long(wanted))
        if exact is not None:
            counts.merged += found.numel()
            mine, other = (np.abs(_long(values) - exact) for values in (found, wanted))
            differ = (found != wanted).numpy()
            counts.nearer += int(differ.sum())
            assert (mine[differ] < other[differ]).all(), f"{name}: the real tool's merge is nearer to the exact one"
            continue
        unequal = int((found.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        assert unequal == 0, f"{name}: {unequal} bytes differ, by up to {(found - wanted).abs().max()}"
    return counts


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch casts float64 to float16 by way of float32, which rounds twice; NumPy does not."""
    if (values.dtype, dtype) == (torch.float64, torch.float16):
        return torch.from_numpy(values.numpy().astype(np.float16))
    return values.to(dtype)
