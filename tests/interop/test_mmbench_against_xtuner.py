"""`eval mmbench` against xtuner's own `mmbench`: every answer, every cell, every score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest

import llava_convert
from tests.interop.conftest import Converter, Source
from tests.interop.peer_programs import in_peer
from tests.mmbench_files import COLUMNS, questions, write_tsv

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", ["tiny", "a_full_vitlora", "b_llmlora_vitlora"])
@pytest.mark.parametrize("kind", ["dev", "ccbench", "test"])
def test_equal_to_xtuner(
    converted: Converter, source: Callable[[str], Source], tmp_path: Path, name: str, kind: str
) -> None:
    left_out = {"dev": (), "ccbench": ("l2-category",), "test": ("answer",)}[kind]
    data = write_tsv(tmp_path / f"{kind}.tsv", questions(), tuple(c for c in COLUMNS if c not in left_out))
    found, folder = source(name), converted(name, "xtuner", dtype="float32")
    whole = (folder / "config.json").is_file()
    words = [str(folder if whole else found.bases / "llm"), "--llava", str(folder)]
    words += ["--visual-encoder", str(found.bases / "vit"), "--prompt-template", "llama3_chat", "--torch-dtype", "fp32"]
    words += ["--data-path", str(data), "--work-dir", str(tmp_path / "theirs"), "--max-new-tokens", "20"]
    theirs = in_peer("xtuner", "run_xtuner_mmbench.py", {"words": words}, tmp_path)
    ours = llava_convert.mmbench(
        found.pth, data=data, work_dir=tmp_path / "ours", dtype="float32", max_new_tokens=20,
        prompt_template="llama3_chat",
    )  # fmt: skip
    table = pandas.read_excel(tmp_path / "ours" / "mmbench_result.xlsx", keep_default_na=False)
    assert list(table.columns) == theirs["columns"]
    assert json.loads(table.to_json(orient="records", force_ascii=False)) == theirs["rows"]
    assert ours.scores == theirs["scores"]
    if kind == "test":
        assert ours.scores is None and not (tmp_path / "ours" / "mmbench_result.json").exists()
    else:
        assert json.loads((tmp_path / "ours" / "mmbench_result.json").read_text()) == theirs["scores"]
