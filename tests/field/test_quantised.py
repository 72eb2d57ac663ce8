"""Models that other programs quantised: the method is named first, a part that is not packed converts, FP8 is exact."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.core.errors import UnsupportedError, UsageError
from tests.field.conftest import Models, edit
from tests.unit.ops.test_fp8 import nearest

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def packed(models: Models, folder: Path, layout: str, config: dict[str, Any], pack: Any) -> Path:
    """A model with the linear layers of its language model packed, as its config says."""
    edit(models.copy(layout, folder), quantization_config=config)
    (folder / "conversion.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in tensors if "layers" in k and "_proj.weight" in k and "vision" not in k]:
        tensors |= pack(key, tensors.pop(key))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_gptq(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    at, (rows, columns) = key.removesuffix("weight"), weight.shape
    return {
        f"{at}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{at}scales": torch.ones(1, rows, dtype=torch.float16),
        f"{at}g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def as_fp8(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As DeepSeek-V3's, a scale for each block of 16 x 16; with one of activations, which only a runtime reads."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 16), -(-columns // 16), generator=torch.Generator().manual_seed(len(key))) + 0.5
    at = key.removesuffix("weight")
    codes = (weight.float() * 100).to(torch.float8_e4m3fn)
    return {key: codes, f"{key}_scale_inv": scale, f"{at}input_scale": torch.ones(1)}


@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.parametrize("to", ["hf", "official", "xtuner", "gguf"])
def test_the_method_is_named_first(models: Models, tmp_path: Path, layout: str, to: str) -> None:
    if layout == to:
        return
    source = packed(models, tmp_path / "source", layout, GPTQ, as_gptq)
    with pytest.raises(UnsupportedError) as found:
        llava_convert.convert(source, to=to, out=tmp_path / "out", visual_encoder=models.tower)
    assert found.value.message.startswith(f"{source} is quantised (GPTQ, 4 bits): ")
    assert found.value.hint == "give the full-precision model that it was made of"
    told = llava_convert.inspect(source)
    assert {p.name: p.detail for p in told.parts}["llm"] == "GPTQ, 4 bits"
    assert "GPTQ, 4 bits" in str(told.targets[to])


def test_a_part_that_is_not_packed_is_a_part(models: Models, tmp_path: Path) -> None:
    source = packed(models, tmp_path / "source", "hf", GPTQ, as_gptq)
    llava_convert.convert(source, to="official", part="projector", out=tmp_path / "out")
    wanted = load_file(models["hf"] / "model.safetensors")["multi_modal_projector.linear_1.weight"]
    found = torch.load(tmp_path / "out/mm_projector.bin")["model.mm_projector.0.weight"]
    assert torch.equal(found, wanted)


def test_bits_without_their_scales_are_said_to_be_that(models: Models, tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    pack = lambda key, w: {key: torch.zeros(w.numel() // 2, 1, dtype=torch.uint8)}  # noqa: E731
    source = packed(models, tmp_path / "source", "hf", config, pack)
    with pytest.raises(UnsupportedError, match=r"bitsandbytes, 4 bits.*absmax.*missing"):
        llava_convert.convert(source, to="official", out=tmp_path / "out")


def test_a_config_that_speaks_of_what_the_weights_are_not(models: Models, tmp_path: Path) -> None:
    source = edit(models.copy("hf", tmp_path / "source"), quantization_config=GPTQ)
    report = llava_convert.convert(source, to="official", out=tmp_path / "out")
    assert any("GPTQ, 4 bits" in note and "floats" in note for note in report.notes)
    assert "quantiz" not in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fp8_is_value_times_scale_rounded_once(models: Models, tmp_path: Path, dtype: str) -> None:
    """Against rational arithmetic on what torch reads of the source."""
    source = packed(models, tmp_path / "source", "hf", FP8, as_fp8)
    with pytest.raises(UnsupportedError, match=r"is quantised \(FP8, 8 bits\)") as refused:
        llava_convert.convert(source, to="official", out=tmp_path / "out")
    assert "dequantize" in str(refused.value.hint)
    report = llava_convert.convert(source, to="official", out=tmp_path / "out", dequantize=True, dtype=dtype)
    assert any("FP8" in note for note in report.notes)
    held, made = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    digits = {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    looked = 0
    for key in [key for key in held if held[key].dtype == torch.float8_e4m3fn][:3]:
        codes, scale = held[key].to(torch.float64).numpy(), held[f"{key}_scale_inv"].numpy()
        found = made[key.removeprefix("language_model.")]
        assert found.dtype == getattr(torch, dtype)
        for r, c in np.ndindex(*codes.shape):
            exact = Fraction(float(codes[r, c])) * Fraction(float(scale[r // 16, c // 16]))
            if abs(exact) < Fraction(1, 8192):
                continue  # float16's subnormals have fewer digits
            assert Fraction(float(found[r, c])) == nearest(exact, digits)
            looked += 1
    assert looked > 5000
    assert not any("scale" in name for name in made) and "quantiz" not in (tmp_path / "out/config.json").read_text()
    untouched = held["language_model.model.norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(made["model.norm.weight"], untouched)


def test_fp8_goes_everywhere_and_verifies(models: Models, tmp_path: Path) -> None:
    source = packed(models, tmp_path / "source", "hf", FP8, as_fp8)
    for to in ("hf", "official", "xtuner", "gguf"):
        llava_convert.convert(source, to=to, out=tmp_path / to, dequantize=True)
        assert llava_convert.verify(source, tmp_path / to)


def test_the_option_where_nothing_is_packed(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not apply"):
        llava_convert.convert(models["hf"], to="official", out=tmp_path / "out", dequantize=True)


def test_a_base_that_is_quantised_is_named(models: Models, tmp_path: Path, tiny: Path) -> None:
    base = Path(shutil.copytree(tiny / "llm", tmp_path / "base"))
    edit(base, quantization_config={"quant_method": "awq", "bits": 4})
    found = CliRunner().invoke(
        app, ["pth", str(models.pth), "--to", "hf", "--llm", str(base), "-o", str(tmp_path / "out")]
    )
    assert found.exit_code == 4 and "is stored quantised (AWQ, 4 bits)" in found.stderr
