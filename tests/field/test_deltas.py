"""A delta of official LLaVA, as `llava.model.make_delta` makes one: told with the line that applies it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llava_convert
from tests.field.conftest import Models, Tensors, edit, edit_tensors


@pytest.fixture(params=["linear", "mlp2x_gelu"])
def first(models: Models, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A LLaVA, as the first were (a projector of one linear layer), and as they are."""
    if request.param != "linear":
        return models.copy("official", tmp_path / "first")

    def change(tensors: Tensors) -> Tensors:
        kept = {name: value for name, value in tensors.items() if "mm_projector" not in name}
        return kept | {f"model.mm_projector.{p}": tensors[f"model.mm_projector.0.{p}"] for p in ("weight", "bias")}

    return edit(edit_tensors(models.copy("official", tmp_path / "first"), change), mm_projector_type="linear")


def test_a_delta_is_told(first: Path) -> None:
    done = llava_convert.convert(first, to="xtuner", out=first.parent / "model")
    assert not [text for text in done.warnings if "delta" in text]
    base = np.random.default_rng(1)

    def delta(tensors: Tensors) -> Tensors:
        """Less a model from which training moved every weight by a little."""
        own = {name: value for name, value in tensors.items() if "mm_projector" not in name}
        return tensors | {n: base.normal(0, 1e-3, v.shape).astype(v.dtype) for n, v in own.items()}

    edit_tensors(first, delta)
    apply = f"llava.model.apply_delta --base-model-path LLAMA --target-model-path OUT --delta-path {first}"
    done = llava_convert.convert(first, to="xtuner", out=first.parent / "out")
    (said,) = [text for text in done.warnings if "delta" in text]
    assert said.startswith("this seems to be a delta") and apply in said
