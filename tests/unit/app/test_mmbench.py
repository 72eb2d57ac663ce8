"""MMBench's files, prompts, rule, and a run that goes on where it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_convert.app.mmbench.answers import Answers, forget
from llava_convert.app.mmbench.data import read_benchmark
from llava_convert.app.mmbench.score import choice, hits, row, scores
from llava_convert.core.errors import InputError, OutputError
from tests.mmbench_files import COLUMNS, COPIES, picture, questions, write_tsv

ENGLISH = "Answer with the option's letter from the given choices directly."


def test_prompts_are_those_of_xtuner(tmp_path: Path) -> None:
    """Written out from xtuner 0.1.23's tools/mmbench.py; pandas takes a cell that says None for an empty one."""
    found = {q.index: q for q in read_benchmark(write_tsv(tmp_path / "dev.tsv", questions())).questions}
    assert found[0].prompt == f"<image>\nWhat is it?\nA. a sun\nB. hills\nD. 7\n{ENGLISH}"
    assert found[1].prompt == f"<image>\nLook closely.\nWhich colour?\nA. thing 1\nB. a sun\n{ENGLISH}"
    assert found[2].prompt == "<image>\n图中有什么？\nA. thing 2\nB. a sun\n请直接回答选项字母。"


def test_a_picture_may_be_that_of_another_row(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_tsv(tmp_path / "dev.tsv", questions()))
    by_index = {q.index: q for q in benchmark.questions}
    first, copy = (benchmark.picture(by_index[i]) for i in (0, 2 * COPIES))
    assert first.tobytes() == copy.tobytes() != benchmark.picture(by_index[1]).tobytes()
    assert first.size == (80, 56)


def test_the_rule(tmp_path: Path) -> None:
    """A question counts when its copies are right, too; the first run of letters decides."""
    benchmark = read_benchmark(write_tsv(tmp_path / "dev.tsv", questions()))
    right = {q.index: str(q.answer) for q in benchmark.questions}
    answers = {**right, 1: "B. a sun", 2: "AB", 3: "the answer is B", 4: "no letter", 5: "b"}
    assert hits(benchmark, answers) == {0: True, 1: True, 2: False, 3: True, 4: False, 5: False}
    assert scores(benchmark, answers) == {"Average": 0.5, "AR": 1.0, "CP": 0.5, "FP-C": 0.0}
    one_copy_wrong = {**right, 3 * COPIES: "C"}
    assert hits(benchmark, one_copy_wrong)[0] is False and sum(hits(benchmark, one_copy_wrong).values()) == 5
    assert choice("Zebra CD, then A") == "CD" and choice("none") == ""


def test_ccbench_is_scored_by_category_and_test_not_at_all(tmp_path: Path) -> None:
    without = tuple(c for c in COLUMNS if c != "l2-category")
    ccbench = read_benchmark(write_tsv(tmp_path / "cc.tsv", questions(), without))
    right = {q.index: str(q.answer) for q in ccbench.questions}
    assert scores(ccbench, right | {2: "D"}) == {"Average": 5 / 6, "kind 0": 2 / 3, "kind 1": 1.0}
    test = read_benchmark(write_tsv(tmp_path / "test.tsv", questions(), tuple(c for c in COLUMNS if c != "answer")))
    assert not test.has_answers
    assert row(test.questions[1], "B") == {
        "question": "What is it?", "A": "hills", "C": "7", "D": "a sun", "prediction": "B", "category": "kind 0",
        "l2-category": "attribute_reasoning", "index": COPIES, "split": None, "answer": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "x"}, r"row 6: index 'x' is not a number"),
        ({"index": 0}, "row 6: its index 0 is that of row 2"),
        ({"question": ""}, "row 6: question is empty"),
        ({"answer": ""}, "row 6: answer is empty"),
        ({"image": "77"}, "row 6: its image '77' leads to no row with a picture"),
        ({"image": "1"}, "row 6: its image '1' leads to no row with a picture"),
        ({"image": picture(1)[:-200] + "!"}, None),
        ({"image": "bm90IGEgcGljdHVyZSBhdCBhbGw="}, "row 6: its image is no picture in base64"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, change: dict[str, object], message: str | None) -> None:
    rows = questions()
    rows[4] |= change
    path = write_tsv(tmp_path / "dev.tsv", rows)
    if message is None:  # its head is sound: found when it is decoded
        benchmark = read_benchmark(path)
        with pytest.raises(InputError, match="row 6: a broken picture"):
            benchmark.picture(benchmark.questions[4])
        return
    with pytest.raises(InputError, match=message) as refused:
        read_benchmark(path)
    assert refused.value.exit_code == 3


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("a\tb\n1\t2\n")
    with pytest.raises(InputError, match="no column index, question, category, image, A; it has a, b"):
        read_benchmark(other)
    other.write_text("a\tb\n1\t2\n1\t2\t3\n")
    with pytest.raises(InputError, match="line 3"):
        read_benchmark(other)
    with pytest.raises(InputError, match="it has no question"):
        read_benchmark(write_tsv(other, []))


def test_answers_survive_a_kill(tmp_path: Path) -> None:
    about = {"model": "m", "data": "d"}
    with Answers(tmp_path, about, 0) as first:
        first.add(0, "A")
        first.add(1, "B\nC")
    with (tmp_path / "answers-0.jsonl").open("a") as cut:
        cut.write('{"index": 2, "predic')
    with Answers(tmp_path, about, 0) as second:
        assert second.found == {0: "A", 1: "B\nC"}
        second.add(2, "D")
    with Answers(tmp_path, about, 1) as other:
        other.add(3, "E")
    second.reread()
    assert second.found == Answers(tmp_path, about, 7).found == {0: "A", 1: "B\nC", 2: "D", 3: "E"}


def test_answers_of_another_run_are_refused(tmp_path: Path) -> None:
    with Answers(tmp_path, {"model": "m", "data": "d"}, 0) as first:
        first.add(0, "A")
    with pytest.raises(OutputError, match="answers of another run: data differ") as refused:
        Answers(tmp_path, {"model": "m", "data": "other"}, 0)
    assert refused.value.exit_code == 6 and "--force" in str(refused.value.hint)
    forget(tmp_path)
    assert Answers(tmp_path, {"model": "m", "data": "other"}, 0).found == {}
    assert list(tmp_path.iterdir()) == []
