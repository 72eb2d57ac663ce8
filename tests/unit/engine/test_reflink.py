"""A rename where files can share blocks: what it writes does not grow with the model."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import llava_convert
from benchmarks.make import Values, write_official, write_tokenizer, write_tower_config
from benchmarks.shapes import Shape
from tests.reflink import MAKE, sharing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="FICLONERANGE is Linux's"),
]
VOCABULARY = 4096
SPARE = 64  # rows without a token, so that none must be added for <image> and <pad>
OWN = 4 << 20  # of a small output: headers, biases, small tensors, a tokenizer


def official(folder: Path, layers: int) -> int:
    """A LLaVA of so many layers in several shards; its bytes."""
    folder.mkdir()
    shape = Shape(1024, 4096, 16, 8, layers, VOCABULARY, 2)
    write_official(folder, shape, "F16", 100 << 20, Values("F16"))
    write_tokenizer(folder, VOCABULARY - SPARE)
    write_tower_config(folder / "tower", shape)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def taken(mount: Path) -> int:
    os.sync()
    return shutil.disk_usage(mount).used


@pytest.mark.parametrize("kind", MAKE)
def test_a_rename_writes_as_little_of_a_large_model_as_of_a_small_one(kind: str, tmp_path: Path) -> None:
    with sharing(kind, tmp_path, 4 << 30) as mount:
        sizes, own = [], []
        for layers in (1, 12):
            source, hf, back = (mount / f"{what}-{layers}" for what in ("source", "hf", "back"))
            sizes.append(official(source, layers))
            before = taken(mount)
            llava_convert.convert(source, to="hf", out=hf, visual_encoder=source / "tower")
            llava_convert.convert(hf, to="official", out=back)
            own.append(taken(mount) - before)
            for out in (hf, back):
                assert llava_convert.verify(source, out, visual_encoder=source / "tower").same
        assert sizes[1] > 3 * sizes[0] > 3 * 10 * OWN, (
            "the one is large beside the other, and both beside what is written"
        )
        assert own[0] < 2 * OWN
        assert own[1] < 2 * OWN
