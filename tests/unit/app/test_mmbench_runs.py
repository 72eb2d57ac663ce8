"""`eval mmbench` on a small model: killed and resumed, in several layouts, by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llava_convert
from llava_convert.core.errors import OutputError
from tests.mmbench_files import questions, write_tsv

pytestmark = pytest.mark.slow
ROWS = len(questions())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("mmbench") / "dev.tsv", questions())


@pytest.fixture(scope="module")
def right(data: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The answers of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("right")
    result = llava_convert.mmbench(tiny / "iter_2.pth", data=data, work_dir=folder, max_new_tokens=8)
    assert (result.questions, result.resumed) == (ROWS, 0)
    return answers(folder)


def answers(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for path in folder.glob("answers-*.jsonl") for line in path.read_text().splitlines()]
    return {line["index"]: line["prediction"] for line in lines if "index" in line}


def command(tiny: Path, data: Path, folder: Path) -> list[str]:
    words = ["-m", "llava_convert", "eval", "mmbench", str(tiny / "iter_2.pth"), "--data", str(data)]
    return [*words, "--work-dir", str(folder), "--max-new-tokens", "8"]


def test_a_killed_run_goes_on(tiny: Path, data: Path, right: dict[int, str], tmp_path: Path) -> None:
    started = subprocess.Popen([sys.executable, *command(tiny, data, tmp_path)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(answers_so_far(tmp_path)) < 2:
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = answers_so_far(tmp_path)
    result = llava_convert.mmbench(tiny / "iter_2.pth", data=data, work_dir=tmp_path, max_new_tokens=8)
    assert result.resumed == len(kept) >= 2
    assert answers_so_far(tmp_path) == right
    with pytest.raises(OutputError, match="max_new_tokens differ"):
        llava_convert.mmbench(tiny / "iter_2.pth", data=data, work_dir=tmp_path, max_new_tokens=9)


def answers_so_far(folder: Path) -> dict[int, str]:
    found = {}
    for path in folder.glob("answers-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            value = json.loads(line) if line.endswith("}\n") else {}
            found |= {value["index"]: value["prediction"]} if "index" in value else {}
    return found


@pytest.mark.parametrize("to", ["official", "hf"])
def test_each_layout_scores_the_same(tiny: Path, data: Path, right: dict[int, str], tmp_path: Path, to: str) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to=to, out=tmp_path / "o", dtype="float32")
    base = {"visual_encoder": str(tiny / "vit")} if to == "official" else {}
    llava_convert.mmbench(tmp_path / "o", data=data, work_dir=tmp_path / "w", max_new_tokens=8, **base)
    assert answers(tmp_path / "w") == right


def test_two_processes_share_the_questions(tiny: Path, data: Path, right: dict[int, str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*words, *command(tiny, data, tmp_path), "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["questions"] == ROWS
    assert {len(path.read_text().splitlines()) - 1 for path in tmp_path.glob("answers-*.jsonl")} == {4, 5}
    assert answers(tmp_path) == right
