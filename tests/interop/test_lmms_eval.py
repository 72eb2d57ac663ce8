"""lmms-eval's own score of a folder before and after `doctor --fix`, and that of `eval TASKS` beside it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

import llava_convert
from tests.doctor_faults import planted
from tests.interop.peer_programs import in_peer
from tests.unit.app.test_benchmarks import HELPER, TASK

pytestmark = pytest.mark.peers


def test_a_planted_eos_costs_the_score_and_doctor_gives_it_back(tiny: Path, tmp_path: Path) -> None:
    """The picture is the one that the tiny model was trained on, so that its answer is known.

    lmms-eval's llava_hf stops at the tokenizer's EOS over the list in generation_config: with another one than what
    ends a turn the answer runs on. This package stops as the model was trained, with that fault too.
    """
    picture = base64.b64encode((tiny / "picture.png").read_bytes()).decode()
    row = {"image": picture, "answer": "a red sun over green hills"}
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tasks / "one.yaml").write_text(TASK.replace("{folder}", str(tasks)))
    (tasks / "helper.py").write_text(HELPER)
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "good", dtype="float32")
    folders = {name: planted(tmp_path / "good", tmp_path / name, "another eos") for name in ("before", "after")}
    (trouble,) = llava_convert.doctor(folders["after"], consumer="transformers").troubles
    assert "lmms-eval's llava_hf" in trouble.what
    assert llava_convert.doctor(folders["after"], consumer="transformers", fix=True)
    job = {
        "task": "one_picture", "include": str(tasks), "report": str(tmp_path / "report.html"),
        "folders": {name: str(folder) for name, folder in (folders | {"good": tmp_path / "good"}).items()},
        "ours": {"ours, pth": str(tiny / "iter_2.pth"), "ours, before": str(folders["before"])},
    }  # fmt: skip
    scores = in_peer("lmms-eval", "run_lmms_eval.py", job, tmp_path)
    assert scores == {"before": 0.0, "after": 1.0, "good": 1.0, "ours, pth": 1.0, "ours, before": 1.0}
    page = (tmp_path / "report.html").read_text()
    assert "a red sun over green hills" in page and "lmms-eval 0.7.3" in page and page.count("data:image/png") == 1
