"""`eval TASKS`: the table, and lmms-eval itself where it is installed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_convert.app.benchmarks.run import with_table
from llava_convert.app.benchmarks.table import Score, as_csv, as_markdown, scores
from llava_convert.cli import app

RESULTS = {
    "mme": {"alias": "mme", "mme_perception_score,none": 1506.0, "mme_cognition_score,none": 295.4},
    "pope": {"pope_f1_score,none": 0.8717, "pope_f1_score_stderr,none": 0.01, "samples": 9000},
    "mine": {"exact_match,none": 0.5, "exact_match_stderr_clt,none": 0.1},
}
TASK = """\
task: one_picture
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function helper.visual
doc_to_text: "What is in this picture?"
doc_to_target: answer
process_results: !function helper.process
generation_kwargs:
  max_new_tokens: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
HELPER = """\
import base64, io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"])))]

def process(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


def test_the_table_has_the_published_headings() -> None:
    found = scores(RESULTS)
    assert Score("pope", "pope_f1_score", 0.8717) in found and len(found) == 4
    assert as_markdown("m", found).splitlines() == [
        "| Model | POPE | MME | mine exact_match |",
        "|---|---|---|---|",
        "| m | 87.2 | 1506/295 | 50.0 |",
    ]
    assert as_csv("m", found).splitlines()[:2] == ["model,task,metric,value", "m,mme,mme_perception_score,1506.0"]


def test_a_card_has_one_table() -> None:
    once = with_table("# M\n\ntext\n", "| a |")
    twice = with_table(once + "\nmore\n", "| b |")
    assert once.startswith("# M\n\ntext\n\n") and "| a |" in once
    assert "| b |" in twice and "| a |" not in twice and twice.endswith("more\n")


@pytest.mark.slow
def test_a_task_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    """A `.pth` scored by lmms-eval: of two questions about the committed picture one wants another answer."""
    pytest.importorskip("lmms_eval")
    picture = base64.b64encode((tiny / "picture.png").read_bytes()).decode()
    rows = [{"image": picture, "answer": answer} for answer in ("a red sun over green hills", "a cat")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.yaml").write_text(TASK.replace("{folder}", str(tmp_path)))
    (tmp_path / "helper.py").write_text(HELPER)
    words = ["eval", "one_picture", str(tiny / "iter_2.pth"), "--include", str(tmp_path), "--json"]
    found = CliRunner().invoke(app, [*words, "--work-dir", str(tmp_path / "w")])
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert value["scores"] == [{"task": "one_picture", "metric": "exact_match", "value": 0.5}]
    assert (tmp_path / "w" / "results.csv").read_text().splitlines()[1] == "iter_2.pth,one_picture,exact_match,0.5"


def test_what_is_missing_is_told(tiny: Path, tmp_path: Path) -> None:
    """A word that is no command is a task; a card that is to get the table must be there."""
    found = CliRunner().invoke(app, ["eval", "mme", str(tmp_path), "--card"])
    assert found.exit_code == 3 and "README.md does not exist" in found.stderr
