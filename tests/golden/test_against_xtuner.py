"""Our conversions against those of the real xtuner 0.1.23, tensor by tensor, bit for bit.

It merges LoRA in float32. Where that rounds another way than the exact merge, ours is the exact one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_convert.app.convert import convert
from llava_convert.app.options import Options
from llava_convert.app.verify import verify
from llava_convert.cli import app
from tests.golden.oracle import assert_same_weights, load, merges
from tests.golden.zero_oracle import load_states

CASES = ("a_full_vitlora", "b_llmlora_vitlora", "c_pretrain", "d_full_fullvit")
# The real converter crashes on `hf` with a frozen tower.
THEIRS = {"xtuner": "xtuner", "official": "official", "hf": "huggingface"}
LLM_ROWS = 512


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted")
    for case in CASES:
        for layout in THEIRS:
            convert(golden / "cases" / case / "pth" / "iter_2.pth", Options(to=layout, out=out / case / layout))
    return out


@pytest.mark.parametrize("layout", THEIRS)
@pytest.mark.parametrize("case", CASES)
def test_tensors_equal(converted: Path, golden: Path, case: str, layout: str) -> None:
    theirs = golden / "cases" / case / THEIRS[layout]
    if not theirs.is_dir():
        assert (case, layout) == ("c_pretrain", "hf"), "the only case where the real converter crashes"
        return
    lora = merges(golden / "cases" / case / "pth" / "iter_2.pth", golden / "parts" / "plain")
    counts = assert_same_weights(load(converted / case / layout), load(theirs), rows=LLM_ROWS, merges=lora)
    print(f"{case}, {layout}: of {counts.merged} merged elements ours is another one, and nearer, in {counts.nearer}")
    assert counts.merged == (0 if layout == "xtuner" else lora.elements)
    assert counts.nearer <= counts.merged / 2000


@pytest.mark.parametrize("case", CASES)
def test_one_dtype_in_official_and_hf(converted: Path, case: str) -> None:
    for layout in ("official", "hf"):
        assert {t.dtype for t in load(converted / case / layout).values()} == {torch.float16}


def test_xtuner_layout_keeps_float32_beside_the_llm(converted: Path) -> None:
    tensors = load(converted / "b_llmlora_vitlora" / "xtuner")
    dtypes = {name.split("/")[0]: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {"llm_adapter": torch.float16, "projector": torch.float32, "visual_encoder_adapter": torch.float32}


def test_pretrain_to_hf_is_the_bases_and_the_projector(converted: Path, golden: Path) -> None:
    """What the real converter cannot do: every tensor is that of a base or of the projector, in float16."""
    ours = load(converted / "c_pretrain" / "hf")
    llm = load_file(golden / "parts" / "plain" / "llm" / "model.safetensors")
    vit = load_file(golden / "parts" / "plain" / "vit" / "model.safetensors")
    projector = load_file(golden / "cases" / "c_pretrain" / "xtuner" / "projector" / "model.safetensors")
    wanted = {f"language_model.{k}": v for k, v in llm.items()} | {f"vision_tower.{k}": v for k, v in vit.items()}
    for index, name in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            wanted[f"multi_modal_projector.{name}.{kind}"] = projector[f"model.{index}.{kind}"]
    assert_same_weights(ours, wanted, rows=LLM_ROWS)


@pytest.mark.parametrize("case", CASES)
def test_added_rows_are_the_mean_of_the_old(converted: Path, case: str) -> None:
    tensors = load(converted / case / "hf")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = tensors[name]
        assert rows.shape[0] == 576
        assert (rows[LLM_ROWS:] == rows[LLM_ROWS]).all()
        mean = rows[:LLM_ROWS].double().mean(0)
        # The mean is taken before the cast to float16, here after it.
        assert torch.allclose(rows[LLM_ROWS].double(), mean, atol=2e-5)


@pytest.mark.parametrize("layout", THEIRS)
@pytest.mark.parametrize("case", CASES)
def test_verify_accepts_theirs_and_finds_one_changed_bit(golden: Path, tmp_path: Path, case: str, layout: str) -> None:
    source, theirs = golden / "cases" / case / "pth" / "iter_2.pth", golden / "cases" / case / THEIRS[layout]
    if not theirs.is_dir():
        assert (case, layout) == ("c_pretrain", "hf")
        return
    # The real converter keeps the base's chat template and stop ids, whatever template was trained with.
    lost = {"chat template", "generation_config.json: eos_token_id"} if layout == "hf" else set()
    verdict = verify(source, theirs)
    assert set(verdict.facts) == lost and verdict.same == (not lost)
    assert not (verdict.different or verdict.missing or verdict.extra or verdict.defects)
    assert set(verdict.rounded) <= merged_tensors(source)
    changed = tmp_path / "changed"
    for file in theirs.rglob("*"):
        target = changed / file.relative_to(theirs)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.write_bytes(file.read_bytes())
    weights = next(changed.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    verdict = verify(source, changed)
    assert len(verdict.different) == 1 and next(iter(verdict.different.values())).elements == 1


def merged_tensors(pth: Path) -> set[str]:
    """Canonical names of the tensors that have LoRA in a checkpoint of xtuner's."""
    found = set()
    for name in load_states(pth)["state_dict"]:
        part, _, module = name.partition(".base_model.model.")
        if ".lora_A." in module:
            prefix = "language_model" if part == "llm" else "vision_tower"
            found.add(f"{prefix}.{module.partition('.lora_A.')[0]}.weight")
    return found


def test_the_command_counts_what_is_rounded_otherwise(golden: Path) -> None:
    """Of the tower, which the real converter keeps in float32, half the elements; of the LLM in float16, 19."""
    case = golden / "cases" / "b_llmlora_vitlora"
    found = CliRunner().invoke(app, ["verify", str(case / "pth" / "iter_2.pth"), str(case / "official")])
    verdict = verify(case / "pth" / "iter_2.pth", case / "official")
    count = sum(difference.elements for difference in verdict.rounded.values())
    said = f"{len(verdict.rounded)} except {count} elements, which a LoRA merge in float32 rounds differently"
    assert found.exit_code == 0 and said in found.stdout
    llm = [d.elements for name, d in verdict.rounded.items() if name.startswith("language_model.")]
    assert sum(llm) == 19


@pytest.mark.parametrize("wrong", ["as it was", "alpha doubled", "without a rank", "one unit"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight"])
def test_verify_tells_another_merge_from_another_rounding(golden: Path, tmp_path: Path, name: str, wrong: str) -> None:
    """In float16 (the LLM) and float32 (the tower), each merged by torch in float32 as the real converter does."""
    case = golden / "cases" / "b_llmlora_vitlora"
    source, theirs = case / "pth" / "iter_2.pth", case / "official"
    trained = load_states(source)["state_dict"]
    tower = name.startswith("vision_tower")
    own = name.replace("vision_tower.", "vision_model.")
    module = f"{'visual_encoder' if tower else 'llm'}.base_model.model.{own.removesuffix('.weight')}"
    a, b = (trained[f"{module}.lora_{side}.default.weight"].float() for side in "AB")
    base = load(golden / "parts" / "plain" / ("vit" if tower else "llm"))[own].float()
    if wrong == "without a rank":
        a = a[:-1]
        b = b[:, :-1]
    merged = base + (b @ a) * (4 if wrong == "alpha doubled" else 2)
    stored = f"model.vision_tower.vision_tower.{own}" if tower else own
    shutil.copytree(theirs, tmp_path / "out")
    (file,) = (file for file in (tmp_path / "out").glob("*.safetensors") if stored in load_file(file))
    tensors = load_file(file)
    merged = merged.to(tensors[stored].dtype)
    assert merged.dtype == (torch.float32 if tower else torch.float16)
    if wrong == "one unit":  # of float16; of float32, which a merge in float32 is not sure of, a hundred
        bits = merged.view(torch.int32 if tower else torch.int16)
        bits[3, 5] += 100 if tower else 1
    assert torch.equal(merged, tensors[stored]) == (wrong == "as it was")
    save_file(tensors | {stored: merged}, file, {"format": "pt"})
    verdict = verify(source, tmp_path / "out")
    canonical = f"vision_tower.{own}" if tower else f"language_model.{own}"
    if wrong == "as it was":
        assert verdict.same and canonical not in verdict.different
    else:
        assert set(verdict.different) == {canonical}
        assert verdict.different[canonical].elements > (merged.numel() / 2 if wrong != "one unit" else 0)


@pytest.mark.parametrize("case", CASES)
def test_configs_say_what_theirs_say(converted: Path, golden: Path, case: str) -> None:
    """Every key that the real converter writes, with its value, but for what FORMATS lists as its defects."""
    for layout, theirs in THEIRS.items():
        for file in ("config.json", "projector/config.json", "visual_encoder/config.json"):
            path = golden / "cases" / case / theirs / file
            if not path.is_file():
                continue
            ours = json.loads((converted / case / layout / file).read_text())
            for key, value in json.loads(path.read_text()).items():
                if key in ("transformers_version", "_name_or_path", "mm_vision_tower", "torch_dtype"):
                    continue
                if key in ("text_config", "vision_config"):
                    stale = ("torch_dtype", "_name_or_path")
                    value = {k: v for k, v in value.items() if k not in stale}
                    assert value == {k: ours[key][k] for k in value}, (layout, file, key)
                elif value is not None:
                    assert ours.get(key) == value, (layout, file, key)


def test_no_local_path_in_any_output(converted: Path, golden: Path) -> None:
    for file in converted.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_bytes()
            assert str(golden).encode() not in text and str(converted).encode() not in text, file
            assert b"parts/plain" not in text, file
