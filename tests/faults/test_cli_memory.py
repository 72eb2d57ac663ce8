"""A checkpoint several times the memory that a process may have: bounded, whatever the model's size."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.corpus import Corpus, edit_json, shell, tiny, trained, write_pth

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds private memory on Linux only")

ROWS, LIMIT = 800_000, 200 << 20
# What a library sets aside for each core, and a stack for each thread, is no matter of the model's size.
FEW = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
LOAD_WHOLE = "import sys; data = open(sys.argv[1], 'rb').read(); print(len(data))"


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_allowed(corpus: Corpus, tmp_path: Path) -> None:
    """410 MB of float32 to 205 MB of float16 with 200 MiB of private memory, interpreter and NumPy included."""
    state, cfg = trained()
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        state[name] = torch.full((ROWS, 64), 0.25)
    source = write_pth(tiny(tmp_path), state, cfg)
    edit_json(tmp_path / "tiny" / "llm" / "config.json", vocab_size=ROWS)
    size = source.stat().st_size
    assert size > 1.9 * LIMIT
    limits = {resource.RLIMIT_DATA: LIMIT, resource.RLIMIT_STACK: 1 << 20}
    whole = shell(source, code=LOAD_WHOLE, limits=limits)
    assert whole.code == 1 and "MemoryError" in whole.stderr, "the limit would not notice a reader of whole files"
    out = tmp_path / "out"
    ran = shell("pth", source, "--to", "xtuner", "-o", out, "--json", limits=limits, environment=FEW)
    assert ran.code == 0, ran.stderr
    assert ran.report["bytes"] > size / 2.1
    assert ran.report["peak_memory"] <= LIMIT
    assert json.loads((out / "config.json").read_text())["vocab_size"] == ROWS
    checked = shell("verify", source, out, limits=limits, environment=FEW)
    assert checked.code == 0 and "61 tensors equal" in checked.stdout, checked.stderr
