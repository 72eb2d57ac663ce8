"""DeepSpeed directories: our conversions against those of the real xtuner 0.1.23.

The real tool rounds the float32 masters to float16 as it reads them, before it merges. We do not, so that what needs
arithmetic differs on purpose. What it does is recomputed here and shown to be its output bit for bit; and ours, to be
nearer to the exact result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_convert.app.convert import convert
from llava_convert.app.inspect import inspect
from llava_convert.app.options import Options
from llava_convert.app.verify import verify
from tests.golden.oracle import assert_same_weights, load
from tests.golden.zero_oracle import masters

CASES = ("a_full_vitlora/zero2", "a_full_vitlora/zero3", "b_llmlora_vitlora/zero2", "c_pretrain/zero2")
LAYOUTS = {"xtuner": "out_xtuner", "official": "out_official", "hf": "out_huggingface"}
LLM_ROWS = 512
SCALE = 16 / 8

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero")
    for case in CASES:
        for layout in LAYOUTS:
            options = Options(to=layout, out=out / case / layout, verify="full")
            convert(golden / "cases" / case / "iter_2.pth", options)
    return out


@pytest.fixture(scope="module")
def trained(golden: Path) -> dict[str, Tensors]:
    return {case: masters(golden / "cases" / case / "iter_2.pth") for case in CASES}


def bases(golden: Path) -> tuple[Tensors, Tensors]:
    parts = golden / "parts" / "plain"
    return load_file(parts / "llm" / "model.safetensors"), load_file(parts / "vit" / "model.safetensors")


def merge(base: Tensors, trained: Tensors, prefix: str, kind: torch.dtype) -> Tensors:
    """A part's weights: whole where they were trained, else the base with its LoRA, computed in `kind`."""
    merged = {}
    for name, weight in base.items():
        module = f"{prefix}base_model.model.{name.removesuffix('.weight')}"
        a, b = (trained.get(f"{module}.lora_{side}.default.weight") for side in "AB")
        if f"{prefix}{name}" in trained:
            merged[name] = trained[f"{prefix}{name}"].to(kind)
        elif a is not None and b is not None:
            merged[name] = weight.to(kind) + (b.to(kind) @ a.to(kind)) * SCALE
        else:
            merged[name] = weight.to(kind)
    return merged


def official(golden: Path, trained: Tensors, kind: torch.dtype) -> Tensors:
    """The official layout of these weights, before the last cast."""
    llm, vit = bases(golden)
    made = merge(llm, trained, "llm.", kind)
    if any(name.startswith("visual_encoder.") for name in trained):
        tower = merge(vit, trained, "visual_encoder.", kind)
        made |= {f"model.vision_tower.vision_tower.{name}": weight for name, weight in tower.items()}
    for name, weight in trained.items():
        if name.startswith("projector."):
            made[name.replace("projector.model", "model.mm_projector")] = weight.to(kind)
    return made


def hf(made: Tensors, golden: Path) -> Tensors:
    """The same weights under transformers' names; a frozen tower comes from the base."""
    prefixes = {
        "model.vision_tower.vision_tower.": "vision_tower.",
        "model.mm_projector.0.": "multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "multi_modal_projector.linear_2.",
        "": "language_model.",
    }
    named = {}
    for name, weight in made.items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        named[prefixes[old] + name.removeprefix(old)] = weight
    tower = {f"vision_tower.{name}": weight for name, weight in bases(golden)[1].items()}
    return {**tower, **named}


def is_llm(name: str) -> bool:
    return not any(part in name for part in ("vision_tower", "mm_projector", "multi_modal_projector"))


@pytest.mark.parametrize("layout", ["official", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_theirs_is_the_merge_of_masters_rounded_to_float16(
    golden: Path, trained: dict[str, Tensors], case: str, layout: str
) -> None:
    """Their whole output, recomputed: it is what rounding first gives, and nothing else."""
    folder = golden / "cases" / case / LAYOUTS[layout]
    if not folder.is_dir():
        assert (case, layout) == ("c_pretrain/zero2", "hf"), "the only case where the real converter crashes"
        return
    rounded = {name: weight.half().float() for name, weight in trained[case].items()}
    wanted = official(golden, rounded, torch.float32)
    wanted = hf(wanted, golden) if layout == "hf" else wanted
    theirs = load(folder)
    assert_same_weights(theirs, wanted, rows=LLM_ROWS)
    assert {name for name, weight in theirs.items() if weight.dtype == torch.float16} == {*filter(is_llm, theirs)}


@pytest.mark.parametrize("layout", ["official", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_ours_is_the_merge_of_the_masters(
    converted: Path, golden: Path, trained: dict[str, Tensors], case: str, layout: str
) -> None:
    """Merged in float64 and rounded once, bit for bit; no bit of the vocabulary's old rows is lost either."""
    wanted = official(golden, trained[case], torch.float64)
    ours = load(converted / case / layout)
    assert {weight.dtype for weight in ours.values()} == {torch.float16}
    assert_same_weights(ours, hf(wanted, golden) if layout == "hf" else wanted, rows=LLM_ROWS)


@pytest.mark.parametrize("case", CASES)
def test_what_needs_no_arithmetic_equals_theirs(converted: Path, golden: Path, case: str) -> None:
    """Whole weights in float16: they are rounded once either way."""
    merged = {"a_full_vitlora": ("vision_tower.",), "b_llmlora_vitlora": ("vision_tower.", "layers.")}
    for layout, folder in LAYOUTS.items():
        theirs = golden / "cases" / case / folder
        if layout == "xtuner" or not theirs.is_dir():
            continue
        skipped = merged.get(case.split("/")[0], ())
        plain = {name: t for name, t in load(theirs).items() if not any(part in name for part in skipped)}
        ours = load(converted / case / layout)
        assert len(plain) >= 4
        assert_same_weights({name: ours[name] for name in plain}, plain, rows=LLM_ROWS)


@pytest.mark.parametrize("case", [case for case in CASES if "lora" in case])
def test_ours_is_nearer_to_the_exact_merge(
    converted: Path, golden: Path, trained: dict[str, Tensors], case: str
) -> None:
    exact = official(golden, trained[case], torch.float64)
    ours, theirs = load(converted / case / "official"), load(golden / "cases" / case / LAYOUTS["official"])
    llm_lora = case.startswith("b_")
    names = [name for name in ours if name.endswith("weight") and ("encoder.layers" in name or "proj.weight" in name)]
    merged = [name for name in names if "layer_norm" not in name and (llm_lora or not is_llm(name))]
    assert len(merged) == (18 + 14 if llm_lora else 18)
    alike = 0
    for name in merged:
        # Both as float16: the rounding of the masters tells them apart, and in a few elements float32's.
        mine = (ours[name].double() - exact[name]).abs()
        other = (theirs[name].half().double() - exact[name]).abs()
        if (ours[name] != theirs[name].half()).sum() <= 2:
            # The tower's last layer has no gradient at feature layer -2: its LoRA is as it began, in bfloat16.
            assert ".encoder.layers.2." in name
            assert (mine <= other).all()
            alike += 1
        else:
            assert mine.mean() < other.mean(), name
    assert alike == 6


@pytest.mark.parametrize("case", CASES)
def test_xtuner_layout_keeps_the_masters(converted: Path, golden: Path, trained: dict[str, Tensors], case: str) -> None:
    """Float32 parts are the masters themselves; theirs are those rounded to float16. The LLM is float16 in both."""
    ours, theirs = load(converted / case / "xtuner"), load(golden / "cases" / case / LAYOUTS["xtuner"])
    assert ours.keys() == theirs.keys()
    lost = 0
    for name, weight in ours.items():
        folder, _, rest = name.rpartition("/")
        prefix = {"projector": "projector.", "visual_encoder_adapter": "visual_encoder."}.get(folder, "llm.")
        rest = rest.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.w", ".lora_B.default.w")
        master = trained[case][prefix + rest]
        assert weight.dtype == (torch.float16 if prefix == "llm." else torch.float32)
        assert theirs[name].dtype == weight.dtype
        assert torch.equal(weight, master.to(weight.dtype)), name
        assert torch.equal(theirs[name], master.half().to(weight.dtype)), name
        lost += int((weight != theirs[name]).sum())
    assert lost > 1000  # elements of which the real tool drops bits


@pytest.mark.parametrize("case", CASES)
def test_opened_by_headers(golden: Path, case: str) -> None:
    folder = golden / "cases" / case / "iter_2.pth"
    found = inspect(folder)
    stage = case[-1]
    assert found.layout == "pth" and found.why == "a DeepSpeed directory (*_model_states.pt, *_optim_states.pt)"
    assert f"float32 masters of 2 ranks, ZeRO-{stage}" in found.notes
    assert found.warnings == inspect(golden / "cases" / case.split("/")[0] / "pth" / "iter_2.pth").warnings
    assert found.settings["prompt template"] == "llama3_chat"
    tensors = sum(part.tensors for part in found.parts)
    assert tensors == {"a": 61, "b": 68, "c": 4}[case[0]]


@pytest.mark.parametrize("case", CASES)
def test_verify_tells_ours_from_theirs(converted: Path, golden: Path, case: str) -> None:
    source = golden / "cases" / case / "iter_2.pth"
    for layout in LAYOUTS:
        assert verify(source, converted / case / layout).same
    verdict = verify(source, golden / "cases" / case / LAYOUTS["xtuner"])
    assert verdict.different, "the real tool's float32 parts hold masters rounded to float16"
