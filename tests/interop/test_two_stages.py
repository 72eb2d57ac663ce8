"""Trainings that start from a first stage (`pretrained_pth`): what of it reaches the model, and so the output.

xtuner wraps a part in peft and loads the first stage afterwards, by name and not strictly. So a first stage which
trained a part whole reaches it when the part is plain now, and passes it by when it has LoRA now: the names differ.
(Ran: with a tower trained whole in stage 1 and LoRA in stage 2, the training model holds the base's tower.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.golden.oracle import assert_same_weights, load
from tests.interop.conftest import Converter, Source

pytestmark = pytest.mark.peers

STAGE_1 = "llm_full_vit_full"


@pytest.fixture
def stage_1(source: Callable[[str], Source]) -> str:
    return str(source(STAGE_1).pth)


@pytest.mark.parametrize("layout", ["official", "hf"])
@pytest.mark.parametrize("name", ["base_bin", "base_sharded", "output_bin_adapters"])
def test_whole_parts_of_stage_1_do_not_reach_parts_under_lora(
    converted: Converter, stage_1: str, name: str, layout: str
) -> None:
    """LoRA on both parts: everything but adapters and projector is the base's."""
    assert_same_weights(
        load(converted(name, layout, pretrained_pth=stage_1)),
        load(converted(name, layout)),
    )


def test_plain_parts_come_from_stage_1(converted: Converter, stage_1: str) -> None:
    ours = load(converted("pretrain_projector", "hf", pretrained_pth=stage_1))
    trained = load(converted(STAGE_1, "hf"))
    for prefix in ("language_model.", "vision_tower."):
        assert_same_weights(
            {key: value for key, value in ours.items() if key.startswith(prefix)},
            {key: value for key, value in trained.items() if key.startswith(prefix)},
        )


def test_official_keeps_the_tower_of_stage_1(converted: Converter) -> None:
    """Frozen in stage 2, trained in stage 1: without it LLaVA's loader takes the published tower, silently."""
    ours = load(converted("pretrained_vit_full_vit_frozen", "official"))
    trained = load(converted("pretrain_vit_full", "official"))
    towers = [{k: v for k, v in each.items() if ".vision_tower." in k} for each in (ours, trained)]
    assert towers[1]
    assert_same_weights(*towers)
