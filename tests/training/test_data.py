"""Rows of every form, and data that are broken: `data check` and training say the same of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_convert.assets.prompts import prompt_template
from llava_convert.cli import app
from llava_convert.core.errors import InputError
from llava_convert.core.resources import training
from tests.training.programs import environment

talk, recipes, rows, sources = training("conversations"), training("recipe"), training("rows"), training("sources")
LLAMA3 = prompt_template("llama3_chat")


def row(*said: str, image: Any = "a.png") -> dict[str, Any]:
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)]
    return {"conversations": turns} | ({"image": image} if image is not None else {})


GOOD = row("<image>\nWhat?", "A boat.")


def recipe_file(tiny: Path, folder: Path, file: str = "d.json", **more: Any) -> Path:
    """A recipe on a file of `folder`, in which there is a picture `a.png`; three iterations."""
    Image.new("RGB", (40, 30), "blue").save(folder / "a.png")
    chosen = recipes.Recipe(
        "t",
        recipes.ModelRecipe(str(tiny / "llm"), str(tiny / "vit")),
        recipes.DataRecipe((recipes.DataSet("d", file),), root=str(folder), workers=0, max_length=80, **more),
        recipes.TrainRecipe(batch_size=1, save_steps=9, dtype="fp32", max_iters=3, warmup_ratio=0.0),
    )
    (folder / "r.toml").write_text(recipes.as_toml(chosen))
    return folder / "r.toml"


def said_of(tiny: Path, folder: Path, file: str = "d.json", **more: Any) -> tuple[Any, Any]:
    """What `data check --open` and training say."""
    path = str(recipe_file(tiny, folder, file, **more))
    check = CliRunner().invoke(app, ["data", "check", path, "--open"])
    run = CliRunner().invoke(app, ["train", path, "--work-dir", str(folder / "w")])
    return check, run


# --- broken data: a name, what makes it in a folder, and the words of both


def rows_in(folder: Path, *values: Any, name: str = "d.json") -> None:
    (folder / name).write_text(json.dumps(list(values)))


def dangling(folder: Path) -> None:
    rows_in(folder, GOOD, row("<image>\nWhat?", "A hat.", image="b.png"))
    (folder / "b.png").symlink_to("nowhere.png")


def cut_picture(folder: Path) -> None:
    rows_in(folder, GOOD, row("<image>\nWhat?", "A hat.", image="b.jpg"))
    Image.effect_noise((60, 60), 90).save(folder / "b.jpg")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:900])


def stands_in(content: bytes, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows_in(folder, GOOD, row("<image>\nWhat?", "A hat.", image="b.png"))
        (folder / name).write_bytes(content)

    return make


def directory(folder: Path) -> None:
    rows_in(folder, GOOD, row("<image>\nWhat?", "A hat.", image="b.png"))
    (folder / "b.png").mkdir()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head></head></html>"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "link to nowhere": (dangling, "b.png"),
    "a folder for a picture": (directory, "b.png"),
    "cut picture": (cut_picture, "image file is truncated"),
    "empty picture": (stands_in(b"", "b.png"), "cannot identify image file"),
    "pointer for a picture": (stands_in(LFS, "b.png"), "is a pointer of git-lfs"),
    "page for a picture": (stands_in(PAGE, "b.png"), "is a web page"),
    "pointer for the data": (stands_in(LFS, "d.json"), "d.json: is a pointer of git-lfs"),
    "page for the data": (stands_in(PAGE, "d.json"), "d.json: is a web page"),
    "empty file": (stands_in(b"", "d.json"), "d.json: line 1: not a list"),
    "empty list": (lambda folder: rows_in(folder), "no conversation with an answer"),
    "no answers": (lambda folder: rows_in(folder, row("Hi"), row()), "no conversation with an answer"),
    "all cut": (lambda folder: rows_in(folder, row("x y " * 99, "A.", image=None)), "no conversation with an answer"),
    "two marks": (
        lambda folder: rows_in(folder, GOOD, row("<image>\nWhat?", "A", "<image>\nAnd?", "B")),
        "row 2: 2 <image> in its questions, 1 pictures",
    ),
    "mark without a picture": (
        lambda folder: rows_in(folder, row("<image>\nWhat?", "A", image="")),
        "row 1: 1 <image> in its questions, 0 pictures",
    ),
    "two pictures": (
        lambda folder: rows_in(folder, row("<image>\nWhat?", "A", image=["a.png", "a.png"])),
        "it is about 2 pictures",
    ),
    "late system": (
        lambda folder: rows_in(
            folder, {"conversations": [*row("Hi", "Ho", image=None)["conversations"], {"from": "system", "value": "x"}]}
        ),
        "row 1: a system message",
    ),
    "another role": (lambda folder: rows_in(folder, {"messages": [{"role": "tool", "content": "x"}]}), "from 'tool'"),
    "half a character": (
        lambda folder: (folder / "d.json").write_text(json.dumps([row("Hi", "\ud800", image=None)])),
        "lone surrogate",
    ),
    "cut file": (lambda folder: (folder / "d.json").write_text(json.dumps([GOOD, GOOD], indent=1)[:-20]), "not JSON"),
    "not UTF-8": (lambda folder: (folder / "d.json").write_bytes(b'["\xff"]'), "not UTF-8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_check_and_training_refuse_alike(tiny: Path, tmp_path: Path, kind: str) -> None:
    """By the same words; and training has made nothing then, but what it learnt before a broken picture."""
    make, words = BROKEN[kind]
    make(tmp_path)
    check, run = said_of(tiny, tmp_path)
    assert (check.exit_code, run.exit_code) == (3, 3), (check.output, run.output)
    assert words in check.stdout and words in run.stderr, (check.stdout, run.stderr)
    if "picture" not in kind:
        assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("kind", ["link to nowhere", "cut picture"])
def test_both_skip_alike(tiny: Path, tmp_path: Path, kind: str) -> None:
    BROKEN[kind][0](tmp_path)
    check, run = said_of(tiny, tmp_path, on_bad_image="skip")
    assert (check.exit_code, run.exit_code) == (0, 0), (check.output, run.output)
    rows_in(tmp_path, row("<image>\nWhat?", "A hat.", image=next(tmp_path.glob("b.*")).name if kind[0] == "c" else "b"))
    check = CliRunner().invoke(app, ["data", "check", str(tmp_path / "r.toml"), "--open"])
    run = CliRunner().invoke(app, ["train", str(tmp_path / "r.toml"), "--work-dir", str(tmp_path / "v")])
    assert (check.exit_code, run.exit_code) == (3, 3), (check.output, run.output)


def test_what_is_left_out_is_counted(tiny: Path, tmp_path: Path) -> None:
    """By both, by reason; and a dry run counts the iterations that the run has."""
    early = {"conversations": [{"from": "gpt", "value": "Hm."}, *row("Hi", "Ho", image=None)["conversations"]]}
    rows_in(
        tmp_path,
        *[GOOD, row("why", image=None), row("Hi", "Ho", "And?", image=None), row("Hi", "Ho")],
        *[early, row("x y " * 99, "A.", image=None)],
    )
    file = recipe_file(tiny, tmp_path)
    file.write_text(file.read_text().replace("max_iters = 3\n", ""))
    check = CliRunner().invoke(app, ["data", "check", str(file)])
    assert check.exit_code == 0 and "6 rows, 4 to train on, 1 about a picture, all pictures there" in check.stdout, (
        check.output
    )
    run = CliRunner().invoke(app, ["train", str(file), "--work-dir", str(tmp_path / "w")])
    for words in (
        "1 rows without an answer", "1 rows whose answer lies beyond max_length", "1 answers before the first question",
        "1 questions without an answer", "1 pictures that no <image> asks for",
    ):  # fmt: skip
        assert f"left out: {words}" in check.stdout and f"d: left out: {words}" in run.stderr, words
    dry = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"])
    assert json.loads(dry.stdout)["stages"][0]["iterations"] == 4
    assert len((tmp_path / "w" / "log.jsonl").read_text().splitlines()) == 4
    again = CliRunner().invoke(app, ["train", str(file), "--work-dir", str(tmp_path / "w"), "--resume"])
    assert "d: left out: 1 rows without an answer" in again.stderr  # from the cache


def test_a_picture_that_nothing_asks_for_is_not_opened(tiny: Path, tmp_path: Path) -> None:
    rows_in(tmp_path, GOOD, row("Hi", "Ho", image="no/such.png"))
    check, run = said_of(tiny, tmp_path)
    assert (check.exit_code, run.exit_code) == (0, 0), (check.output, run.output)


# --- forms of rows


def one_row(value: Any) -> Any:
    (found,) = rows.rows_of(value, "conversations", Path("d.json"), 1, 1)
    return found


def turns(value: Any, template: Any = LLAMA3) -> Any:
    found, _ = talk.turns_of(one_row(value), template, Path("d.json"))
    return found


@pytest.mark.parametrize(
    "value",
    [
        {"image": ["a.png"], "conversations": GOOD["conversations"]},
        {"image": "a.png", "messages": [{"role": "user", "content": "<image>\nWhat?"},
                                        {"role": "assistant", "content": "A boat."}]},
        {"images": ["a.png"], "conversations": [{"from": "user", "value": "What? <image>"},
                                                {"from": "assistant", "value": "A boat."}]},
    ],
)  # fmt: skip
def test_other_forms_are_the_same_row(value: Any) -> None:
    assert turns(value) == turns(GOOD)
    assert one_row(value).image == "a.png"


def test_a_system_message_is_what_the_template_makes_of_it() -> None:
    """As xtuner's template_map_fn puts it: before the first question alone."""
    said = [{"from": "system", "value": "Be brief."}, *row("Hi", "Ho", "And?", "So.", image=None)["conversations"]]
    first, second = turns({"conversations": said})
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert first.asked.startswith(head.format("system") + "Be brief.<|eot_id|>" + head.format("user") + "Hi")
    assert "Be brief" not in second.asked
    with pytest.raises(InputError, match="row 1: a system message, and the prompt template plain has no place for one"):
        turns({"conversations": said}, talk.PLAIN)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n", encoding="utf-8-sig")
    assert len(list(rows.read_rows(tmp_path / "a.json"))) == 1
    assert [(r.number, r.line) for r in rows.read_rows(tmp_path / "a.jsonl")] == [(1, 1), (2, 3)]


# --- reading


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 20])
def test_a_list_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None) -> None:
    """However little is read at once, rows and lines are json's own."""
    monkeypatch.setattr(rows, "_PIECE", piece)
    values = [row('a "quoted" \\ [text]', "日本 \n ü", image=None), GOOD, row("<image>", "x" * 300)]
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text)
    found = list(rows.read_rows(tmp_path / "a.json"))
    assert [[text for _, text in one.messages] for one in found] == [
        [turn["value"] for turn in value["conversations"]] for value in values
    ]
    starts = [text[: text.index('"conversations"')].count("\n") for text in [text]]
    assert found[0].line == (starts[0] if indent else 1) and all(one.line == 1 for one in found) == (indent is None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"conversations": []},\n{"conversations": [}\n]', "line 3, row 2: not JSON: Expecting value"),
        ('[\n{"conversations": []}\n{"conversations": []}]', "line 3, row 2: not JSON: Expecting ',' or ']'"),
        ('[{"conversations": []}]\n[]', "line 2, row 2: not JSON: Extra data"),
        ('[{"conversations": []},\n{"conversations": "x', "line 2, row 2: not JSON: Unterminated string"),
        ('{"data": []}', "line 1: not a list of conversations"),
        ('[{"conversations": []},\n\n7]', "line 3, row 2: not a conversation: not an object"),
    ],
)
def test_an_error_has_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        list(rows.read_rows(tmp_path / "a.json"))
    assert said in caught.value.message


def test_a_bad_line_has_its_number(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD)] * 30
    lines[17] = lines[17][:40]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"a\.jsonl: line 18: not JSON"):
        list(rows.read_rows(tmp_path / "a.jsonl"))


MEASURE = """
import sys
from pathlib import Path
from llava_convert.core.resources import training
rows = training("rows")
print(sum(len(row.messages) for row in rows.read_rows(Path(sys.argv[1]))))
"""


def test_a_large_list_needs_little_memory(tmp_path: Path) -> None:
    """64 MB in one line; the process may have 32 MB more than it has after its imports."""
    text = json.dumps(row("<image>\nWhat?", "word " * 400))
    with (tmp_path / "a.json").open("w") as file:
        file.write("[")
        file.writelines(f"{text}," for _ in range(30_999))
        file.write(f"{text}]")
    assert (tmp_path / "a.json").stat().st_size > 64_000_000
    (tmp_path / "measure.py").write_text(MEASURE)

    def peak(file: Path) -> int:
        words = [sys.executable, str(tmp_path / "measure.py"), str(file)]
        with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            count = int(running.stdout.read())
            _, _, used = os.wait4(running.pid, 0)
            running.returncode = 0
        assert count == (2 if file.stem == "small" else 62_000)
        return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    rows_in(tmp_path, GOOD, name="small.json")
    assert peak(tmp_path / "a.json") < peak(tmp_path / "small.json") + 32_000_000


# --- the trees of the known sets


def test_a_missing_link_is_answered_with_its_command(tmp_path: Path) -> None:
    """Where what it leads to is there; the command makes what the tree has."""
    root = tmp_path / "my data" / "internvl_sft"
    root.mkdir(parents=True)
    for there in ("llava_data/llava_images/coco/train2017", "sharegpt4v/data/sam/images"):
        (root.parent / there).mkdir(parents=True)
        (root.parent / there / "1.jpg").touch()
    (root.parent / "llava_data/LLaVA-Pretrain/images").mkdir(parents=True)
    for place in ("data/coco/train2017", "data/sam/images", "data/llava/llava_pretrain/images/00453"):
        (line,) = list(sources.advice(str(root / place), root))
        command = line.removeprefix("    link it: ")
        assert command != line, line
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (root / "data/coco/train2017/1.jpg").is_file() and (root / "data/sam/images/1.jpg").is_file()
    assert str((root / "data/coco").readlink()) == "../../llava_data/llava_images/coco"
    assert str((root / "data/llava/llava_pretrain/images").readlink()) == "../../../../llava_data/LLaVA-Pretrain/images"
    lines = list(sources.advice(str(root / "data/gqa/images"), root))
    assert "get it: https://downloads.cs.stanford.edu" in lines[0] and "then ln -sfn" in lines[1]


def test_the_archives_of_internvl() -> None:
    root = Path("data/internvl_sft")
    (line,) = sources.advice(str(root / "dvqa_train_200k.jsonl"), root)
    assert line.endswith("unzip -j playground.zip '*.jsonl' -d data/internvl_sft")
    (line,) = sources.advice(str(root / "data/docvqa/test"), root)
    assert "test.tar.gz" in line


def test_evaluation_sets_are_checked_too(tiny: Path, tmp_path: Path) -> None:
    rows_in(tmp_path, GOOD)
    file = recipe_file(tiny, tmp_path)
    (chosen,) = recipes.load_recipe(str(file))
    held = recipes.EvalRecipe(every=1, sets=(recipes.DataSet("held", "no.json"),))
    file.write_text(recipes.as_toml(replace(chosen, eval=held)))
    for words in (["data", "check", str(file)], ["train", str(file), "--work-dir", str(tmp_path / "w")]):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 3 and "no.json: no such data file" in found.output
