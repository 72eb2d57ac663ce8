"""What real trainers leave of a LoRA over a LLaVA: merged here, every tensor is exact and the logits are those of peft.

transformers 4.46 with peft 0.12, 4.57 with 0.18 and 5.23 with 0.21, each with its plain Trainer; TRL, LLaMA-Factory and
ms-swift. Each trains two steps on a processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import llava_convert
from tests.interop.adapter_recipe import recipe
from tests.interop.conftest import gap
from tests.interop.peer_programs import in_peer
from tests.interop.test_transformers import load_hf
from tests.peers.save_adapters import logits

pytestmark = pytest.mark.peers
ENVIRONMENTS = ("peft-4.46", "trainers-4.57", "trl")
VARIANTS = ("all_linear", "saved_modules", "rslora", "dora", "patterns", "embedding", "saved_embedding", "bias_all")
TOLERANCE = 1e-4  # releases sum attention in another order


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "llava"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, dtype="float32", prompt_template="llama3_chat")
    return out


def check(out: Path, base: Path, adapter: Path, right: Any) -> None:
    """Tensors bit for bit, and logits; the adapter does something."""
    found = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    want = recipe(load_file(base / "model.safetensors"), adapter)
    assert found.keys() == want.keys()
    wrong = [name for name in want if not np.array_equal(found[name], want[name])]
    assert not wrong
    model = load_hf(out)
    assert gap(logits(model, model.config), torch.tensor(right)) <= TOLERANCE
    model = load_hf(base)
    assert gap(logits(model, model.config), torch.tensor(right)) > 100 * TOLERANCE


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_saved_by_each_release_of_peft(base: Path, tmp_path: Path, environment: str) -> None:
    job = {"base": str(base), "out": str(tmp_path), "variants": VARIANTS}
    made = in_peer(environment, "save_adapters.py", job, tmp_path)
    for name in VARIANTS:
        out = tmp_path / f"{name}-out"
        llava_convert.convert(tmp_path / name, to="hf", out=out, dtype="float32")
        check(out, base, tmp_path / name, made["logits"][name])


def trained(environment: str, trainer: str, base: Path, folder: Path, **options: Any) -> tuple[Path, Any]:
    """The run's folder, and the logits of base and last adapter."""
    run = folder / "run"
    job = {"trainer": trainer, "base": str(base), "out": str(run), "options": options}
    return run, in_peer(environment, "train_adapters.py", job, folder)["logits"]


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"Trainer, {each}": (each, "transformers", {"variant": "all_linear"}) for each in ENVIRONMENTS},
    "Trainer with the projector saved": ("trl", "transformers", {"variant": "saved_modules"}),
    "TRL": ("trl", "trl", {"target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"]}),
    "LLaMA-Factory": (
        "trainers-4.57",
        "llamafactory",
        {"lora_target": "all", "additional_target": "multi_modal_projector"},
    ),
    "LLaMA-Factory with the tower": (
        "trainers-4.57",
        "llamafactory",
        {"lora_target": "all", "freeze_vision_tower": False, "use_rslora": True, "use_dora": True},
    ),
    "ms-swift": ("trainers-4.57", "swift", {}),
    "ms-swift with all": (
        "trainers-4.57",
        "swift",
        {"freeze_vit": False, "freeze_aligner": False, "modules_to_save": ["lm_head"], "use_rslora": True},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_of_a_run(base: Path, tmp_path: Path, name: str) -> None:
    """The run's folder, one checkpoint of it, and both as PEFT."""
    environment, trainer, options = RUNS[name]
    run, right = trained(environment, trainer, base, tmp_path, **options)
    report = llava_convert.convert(run, to="hf", out=tmp_path / "out", dtype="float32", verify="full")
    check(tmp_path / "out", base, run / "checkpoint-2", right)
    if not (run / "adapter_model.safetensors").exists():
        assert any("checkpoint-2 is taken" in note for note in report.notes)
    llava_convert.convert(run / "checkpoint-1", to="hf", out=tmp_path / "first", dtype="float32")
    assert llava_convert.verify(run / "checkpoint-1", tmp_path / "first")
    assert not llava_convert.verify(run / "checkpoint-2", tmp_path / "first")
    llava_convert.convert(run, to="peft", out=tmp_path / "adapter")
    llava_convert.convert(tmp_path / "adapter", to="hf", out=tmp_path / "again", dtype="float32", base=str(base))
    check(tmp_path / "again", base, run / "checkpoint-2", right)
