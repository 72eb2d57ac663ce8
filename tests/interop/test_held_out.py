"""Every case that the real xtuner trained and converted here, through our converter: bit for bit the same.

What differs on purpose is listed, with the defect of the real converter that is the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_convert
from llava_convert.core.errors import UnsupportedError
from tests.golden.oracle import Merges, assert_same_weights, load, merges
from tests.interop.conftest import Converter, Source
from tests.interop.peer_programs import PEERS

pytestmark = pytest.mark.peers

THEIRS = {"xtuner": "xtuner", "official": "official", "hf": "huggingface"}
INDEX = PEERS / "cases" / "cases.json"
NAMES = tuple(json.loads(INDEX.read_text())) if INDEX.is_file() else ("none",)
# transformers' LLaVA has exactly two linear layers in its projector.
NO_HF = ("projector_depth1", "projector_depth3")
HEAD = "lm_head.weight"

# (case, layout) -> tensors that the real converter left out, though its loader needs them.
LEFT_OUT = {
    ("tied_embeddings_llmlora", "official"): (
        {HEAD},
        "safetensors drops one of two tied tensors, and LLaVA does not tie them again",
    ),
}
# It ignores the first stage, whose tower this case was trained over: ours carries that tower, so that no loader takes
# the published one in its place (test_two_stages.py compares it).
LOST_TOWER = ("pretrained_vit_full_vit_frozen", ("official", "xtuner"))
# (case, key) -> why the real config is wrong and ours says something else.
WRONG_CONFIG = {
    ("visual_select_layer_last", "vision_feature_layer"): "it writes -2 whatever layer was trained",
    ("tokens510_rows510", "pad_token_id"): "its pad token is one past the last row",
    ("tokens510_rows510", "vocab_size"): "rows for the pad token are missing",
    (LOST_TOWER[0], "unfreeze_mm_vision_tower"): "the tower of the first stage is left out",
}
# Stale, or about the folder that the model came from.
NOT_COMPARED = ("transformers_version", "_name_or_path", "mm_vision_tower", "torch_dtype")
TOWERS = ("visual_encoder", "model.vision_tower.", "vision_tower.")
PROJECTORS = ("projector/", "model.mm_projector.", "multi_modal_projector.")


@dataclass(frozen=True)
class Case:
    """What cases.json says of a case."""

    name: str
    rows: int
    theirs: Path
    made: frozenset[str]
    merges: Merges

    def folder(self, layout: str) -> Path | None:
        return self.theirs / THEIRS[layout] if THEIRS[layout] in self.made else None


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, cases: Path) -> Case:
    entry = json.loads((cases / "cases.json").read_text())[request.param]
    rows = json.loads((cases / entry["llm"]).read_text())["vocab_size"]
    folder = cases / "cases" / request.param
    lora = merges(folder / "pth" / "iter_2.pth", (cases / entry["llm"]).parents[1], str(entry["settings"]))
    return Case(request.param, rows, folder, frozenset(entry["made"]), lora)


def _without(tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _left_out(case: str, layout: str, ours: dict[str, torch.Tensor]) -> set[str]:
    """The tensors of ours that the real converter has not, for a reason."""
    if case == LOST_TOWER[0] and layout in LOST_TOWER[1]:
        return {name for name in ours if name.startswith(TOWERS)}
    return LEFT_OUT.get((case, layout), (set(), ""))[0]


@pytest.mark.parametrize("layout", THEIRS)
def test_tensors_equal_in_float16(converted: Converter, case: Case, layout: str) -> None:
    folder = case.folder(layout)
    if folder is None:
        return  # test_what_the_real_converter_cannot_make has these
    ours, theirs = load(converted(case.name, layout)), load(folder)
    left_out = _left_out(case.name, layout, ours)
    assert left_out <= ours.keys() and not left_out & theirs.keys()
    counts = assert_same_weights(_without(ours, left_out), theirs, rows=case.rows, merges=case.merges)
    print(f"of {counts.merged} merged elements ours is another one, and nearer, in {counts.nearer}")
    assert counts.nearer <= counts.merged / 1000


@pytest.mark.parametrize("layout", THEIRS)
def test_float32_parts_equal_in_float32(converted: Converter, case: Case, layout: str) -> None:
    """The real converter keeps tower and projector in float32: but for merged elements, each to the last bit."""
    folder = case.folder(layout)
    if folder is None:
        return
    ours, theirs = (
        {k: v for k, v in load(each).items() if k.startswith((*TOWERS, *PROJECTORS))}
        for each in (converted(case.name, layout, dtype="float32"), folder)
    )
    ours = _without(ours, _left_out(case.name, layout, ours))
    assert {tensor.dtype for tensor in (*ours.values(), *theirs.values())} == {torch.float32}
    assert any(name.startswith(PROJECTORS) for name in theirs)
    assert_same_weights(ours, theirs, merges=case.merges)


def test_output_fp32_equals_in_float32(converted: Converter, cases: Path) -> None:
    for layout, name in THEIRS.items():
        theirs = load(cases / "cases" / "output_fp32" / name)
        assert {tensor.dtype for tensor in theirs.values()} == {torch.float32}
        lora = merges(cases / "cases" / "output_fp32" / "pth" / "iter_2.pth", cases / "parts" / "plain")
        assert_same_weights(load(converted("output_fp32", layout, dtype="float32")), theirs, rows=512, merges=lora)


@pytest.mark.parametrize("layout", THEIRS)
def test_verify_says_what_is_wrong_with_theirs(source: Callable[[str], Source], case: Case, layout: str) -> None:
    folder = case.folder(layout)
    if folder is None:
        return
    verdict = llava_convert.verify(source(case.name).pth, folder)
    if case.name == LOST_TOWER[0] and layout in LOST_TOWER[1]:
        assert len(verdict.missing) == 55 and all(name.startswith("vision_tower.") for name in verdict.missing)
        return
    left_out, _ = LEFT_OUT.get((case.name, layout), (set(), ""))
    assert verdict.missing == tuple(f"language_model.{name}" for name in sorted(left_out))
    assert verdict.different == {} and verdict.extra == ()
    wrong_layer = (case.name, layout) == ("visual_select_layer_last", "hf")
    assert ("vision.feature_layer" in verdict.facts) == wrong_layer
    lost = {"chat template", "generation_config.json: eos_token_id"} if layout == "hf" else set()
    assert set(verdict.facts) - {"vision.feature_layer"} <= lost


@pytest.mark.parametrize("layout", THEIRS)
def test_what_the_real_converter_cannot_make(
    converted: Converter, source: Callable[[str], Source], case: Case, layout: str
) -> None:
    if case.folder(layout) is not None:
        return
    if layout == "hf" and case.name in NO_HF:
        with pytest.raises(UnsupportedError, match="transformers' LLaVA has exactly 2") as refused:
            converted(case.name, layout)
        assert refused.value.exit_code == 4
        return
    out = converted(case.name, layout)
    verdict = llava_convert.verify(source(case.name).pth, out)
    assert verdict.same and verdict.equal == len(load(out))


def test_frozen_tower_comes_from_the_base_or_stage_1(converted: Converter, source: Callable[[str], Source]) -> None:
    """Of four cases whose `hf` the real converter cannot make, one was trained over the first stage's tower."""
    first_stage = load(converted("pretrain_vit_full", "hf"))
    for name in ("llm_full_vit_frozen", "llmlora_vit_frozen", "pretrain_projector", "pretrained_vit_full_vit_frozen"):
        base = {f"vision_tower.{key}": value for key, value in load(source(name).bases / "vit").items()}
        wanted = first_stage if name == "pretrained_vit_full_vit_frozen" else base
        wanted = {key: value for key, value in wanted.items() if key.startswith("vision_tower.")}
        ours = {key: value for key, value in load(converted(name, "hf")).items() if key.startswith("vision_tower.")}
        assert_same_weights(ours, wanted)


@pytest.mark.parametrize("layout", THEIRS)
def test_configs_say_what_theirs_say(converted: Converter, case: Case, layout: str) -> None:
    folder = case.folder(layout)
    if folder is None:
        return
    for file in ("config.json", "projector/config.json", "visual_encoder/config.json", *ADAPTER_CONFIGS):
        path = folder / file
        if not (case.name == LOST_TOWER[0] and file == "visual_encoder/config.json"):
            assert path.is_file() == (converted(case.name, layout) / file).is_file(), file
        if path.is_file():
            ours = json.loads((converted(case.name, layout) / file).read_text())
            assert _differences(case.name, ours, json.loads(path.read_text())) == {}, file


ADAPTER_CONFIGS = ("llm_adapter/adapter_config.json", "visual_encoder_adapter/adapter_config.json")
# Of adapter_config.json: the base's path, and what only training reads.
NOT_COMPARED_OF_ADAPTERS = ("base_model_name_or_path", "megatron_config", "megatron_core")


def _differences(case: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of theirs whose value ours does not share: key -> (ours, theirs). Absent, null, false and empty are one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in theirs.items():
        if key in (*NOT_COMPARED, *NOT_COMPARED_OF_ADAPTERS):
            continue
        mine: Any = ours.get(key)
        if key in ("text_config", "vision_config"):
            found |= {f"{key}.{k}": v for k, v in _differences(case, mine, value).items()}
        elif key == "target_modules":  # a set in random order
            found |= {} if sorted(mine) == sorted(value) else {key: (mine, value)}
        elif (mine or None) != (value or None):
            if (case, key) in WRONG_CONFIG:
                continue
            found[key] = (mine, value)
    return found
