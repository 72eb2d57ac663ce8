"""A delta of official LLaVA, as `llava.model.make_delta` makes one: refused with the line that applies it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llava_convert
from llava_convert.core.errors import UnsupportedError
from tests.field.conftest import Models, Tensors, edit, edit_tensors


@pytest.fixture
def first(models: Models, tmp_path: Path) -> Path:
    """As LLaVA's first models: a projector of one linear layer."""

    def change(tensors: Tensors) -> Tensors:
        kept = {name: value for name, value in tensors.items() if "mm_projector" not in name}
        return kept | {f"model.mm_projector.{p}": tensors[f"model.mm_projector.0.{p}"] for p in ("weight", "bias")}

    return edit(edit_tensors(models.copy("official", tmp_path / "first"), change), mm_projector_type="linear")


def test_a_delta_is_refused(first: Path) -> None:
    assert llava_convert.inspect(first).layout == "official"
    base = np.random.default_rng(1)

    def delta(tensors: Tensors) -> Tensors:
        """Less a model from which training moved every weight by a little."""
        own = {name: value for name, value in tensors.items() if "mm_projector" not in name}
        return tensors | {n: base.normal(0, 1e-3, v.shape).astype(v.dtype) for n, v in own.items()}

    edit_tensors(first, delta)
    apply = f"llava.model.apply_delta --base-model-path LLAMA --target-model-path OUT --delta-path {first}"
    found = llava_convert.inspect(first)
    assert found.kind.startswith("a delta of official LLaVA") and apply in found.next
    with pytest.raises(UnsupportedError, match="a delta of official LLaVA") as refused:
        llava_convert.plan(first, to="hf", out=first.parent / "out")
    assert apply in str(refused.value.hint)
