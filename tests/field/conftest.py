"""Small models to change: one in each layout, and one with a SigLIP tower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llava_convert

LAYOUTS = ("hf", "official", "xtuner", "gguf")


@dataclass(frozen=True)
class Models:
    """The tiny checkpoint in each layout, once; `copy` gives one to change."""

    folder: Path
    pth: Path
    tower: Path

    def __getitem__(self, layout: str) -> Path:
        return self.pth if layout == "pth" else self.folder / layout

    def copy(self, layout: str, to: Path) -> Path:
        shutil.copytree(self[layout], to)
        return to


@pytest.fixture(scope="session")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    for layout in LAYOUTS:
        types = {"outtype": "f16,q8_0", "mmproj_outtype": "f16"} if layout == "gguf" else {}
        llava_convert.convert(
            tiny / "iter_2.pth", to=layout, out=folder / layout, name="good", prompt_template="llama3_chat", **types
        )
    return Models(folder, tiny / "iter_2.pth", tiny / "vit")


def edit(folder: Path, file: str = "config.json", /, **values: Any) -> Path:
    """Set keys of a JSON file; `text_config__rope_theta` is a key within an object, None takes a key away."""
    path = folder / file
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content, indent=1))
    return folder


Tensors = dict[str, np.ndarray]


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors | None], file: str = "model.safetensors") -> Path:
    path = folder / file
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    made = change(tensors) or tensors
    path.unlink()
    save_file({name: np.ascontiguousarray(array) for name, array in made.items()}, path, {"format": "pt"})
    return folder


def find(tensors: Tensors, *parts: str) -> str:
    return next(name for name in sorted(tensors) if all(part in name for part in parts))
