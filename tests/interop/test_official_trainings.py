"""What llava-torch's own train.py leaves: LoRA with its projector, projectors alone, checkpoints, whole trainings.

Tensors are those of a recipe of the test's own; logits are those of the model that the project's own loader makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import llava_convert
from llava_convert.core.errors import InputError
from tests.field.conftest import edit
from tests.interop.adapter_recipe import Tensors, recipe, stored
from tests.interop.conftest import gap
from tests.interop.peer_programs import in_peer
from tests.interop.test_transformers import load_hf

pytestmark = pytest.mark.peers
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
HALF = 5e-3  # the loader lays float16 over float16, and rounds between
TEXT = ([5, 6, 7], [8, 9, 10, 11])
LINEAR = {"0": "linear_1", "2": "linear_2"}


class Bases:
    """The tiny language model, with a token for what is unknown as the training wants it, and LLaVAs made of it."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tower = tiny / "vit"
        self.llm = shutil.copytree(tiny / "llm", folder / "llm")
        self.llava = folder / "llava"
        llava_convert.convert(tiny / "iter_2.pth", to="official", out=self.llava, dtype="float16")
        self.bridge = folder / "bridge"
        llava_convert.convert(tiny / "iter_2.pth", to="official", out=self.bridge, part="projector", dtype="float32")
        for model in (self.llm, self.llava):
            path = model / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": "<|reserved_special_token_9|>"}))
        edit(self.llava, mm_vision_tower=str(self.tower))  # which its loader takes for a folder alone by a whole path

    def tensors(self, base: Path, trained: Path) -> Tensors:
        """All by the names of transformers, in float32: of the base, the tower beside it, and the trained projector."""
        found = {f"vision_tower.{name}": value for name, value in _load(self.tower / "model.safetensors").items()}
        for file in base.glob("*.safetensors"):
            found |= {stored(n): value for n, value in _load(file).items() if "mm_projector" not in n}
        return found | bridge(trained)


def _load(file: Path) -> Tensors:
    from safetensors.torch import load_file as load

    return {name: value.float().numpy() for name, value in load(file).items()}


def bridge(file: Path) -> Tensors:
    found = {}
    for name, value in torch.load(file).items():
        index, param = name.rpartition("mm_projector.")[2].split(".")
        found[f"multi_modal_projector.{LINEAR[index]}.{param}"] = value.float().numpy()
    return found


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tiny, tmp_path_factory.mktemp("bases"))


def train(bases: Bases, base: Path, folder: Path, options: dict[str, Any]) -> tuple[Path, torch.Tensor]:
    job = {
        "base": str(base),
        "over": str(base) if "tune_mm_mlp_adapter" in options else None,
        "tower": str(bases.tower),
        "out": str(folder / "run"),
        "options": options,
        "lora": "lora_enable" in options,
        "ids": [*TEXT[0], -200, *TEXT[1]],
    }
    return folder / "run", torch.tensor(in_peer("llava", "train_official.py", job, folder)["logits"])


def ours(out: Path) -> torch.Tensor:
    """Of the tokens and the picture that the loaded model was shown."""
    model = load_hf(out)
    ids = torch.tensor([[*TEXT[0], *[model.config.image_token_index] * 16, *TEXT[1]]])
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    return logits


def check(out: Path, want: Tensors, right: torch.Tensor) -> None:
    found = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert np.array_equal(found[name][: len(value)], value), name
    assert gap(ours(out)[:, : right.shape[1]], right) <= HALF


@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_over_a_language_model(bases: Bases, tmp_path: Path, bias: str) -> None:
    bridged = {"pretrain_mm_mlp_adapter": bases.bridge / "mm_projector.bin", "lora_bias": bias}
    run, right = train(bases, bases.llm, tmp_path, LORA | {name: str(value) for name, value in bridged.items()})
    llava_convert.convert(run, to="hf", out=tmp_path / "out", dtype="float32", verify="full")
    want = recipe(bases.tensors(bases.llm, run / "non_lora_trainables.bin"), run)
    check(tmp_path / "out", want, right)
    assert any(not np.array_equal(v, want[n]) for n, v in bridge(bases.bridge / "mm_projector.bin").items())
    # Half way, without DeepSpeed, there is no projector anywhere.
    with pytest.raises(InputError, match="no projector") as refused:
        llava_convert.convert(run / "checkpoint-1", to="hf", out=tmp_path / "half")
    assert "projector" in str(refused.value.hint)
    given = run / "non_lora_trainables.bin"
    llava_convert.convert(run / "checkpoint-1", to="hf", out=tmp_path / "half", dtype="float32", projector=given)
    found = {n: v for file in (tmp_path / "half").glob("*.safetensors") for n, v in load_file(file).items()}
    half = recipe(bases.tensors(bases.llm, given), run / "checkpoint-1")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(found[name], half[name]) and not np.array_equal(half[name], want[name])


def test_lora_over_a_whole_llava(bases: Bases, tmp_path: Path) -> None:
    run, right = train(bases, bases.llava, tmp_path, LORA)
    report = llava_convert.convert(run, to="hf", out=tmp_path / "out", dtype="float32", visual_encoder=str(bases.tower))
    check(tmp_path / "out", recipe(bases.tensors(bases.llava, run / "non_lora_trainables.bin"), run), right)
    assert report.layouts == ("official", "hf")
    told = llava_convert.convert(run / "checkpoint-2", to="hf", out=tmp_path / "half").warnings
    assert any("has no projector, and that of its base is taken" in each for each in told)


def test_a_projector_alone(bases: Bases, tmp_path: Path) -> None:
    run, right = train(bases, bases.llm, tmp_path, {"tune_mm_mlp_adapter": True})
    for source in (run, run / "mm_projector.bin", run / "checkpoint-2"):
        out = tmp_path / f"out-{source.name}"
        llava_convert.convert(source, to="hf", out=out, dtype="float32")
        file = source if source.is_file() else source / "mm_projector.bin"
        check(out, bases.tensors(bases.llm, file), right)


def test_a_whole_training(bases: Bases, tmp_path: Path) -> None:
    run, right = train(bases, bases.llm, tmp_path, {"pretrain_mm_mlp_adapter": str(bases.bridge / "mm_projector.bin")})
    llava_convert.convert(run, to="hf", out=tmp_path / "out", dtype="float32")
    assert gap(ours(tmp_path / "out")[:, : right.shape[1]], right) <= HALF
    llava_convert.convert(run / "checkpoint-1", to="hf", out=tmp_path / "half", dtype="float32")
    assert not llava_convert.verify(run, tmp_path / "half")
