"""RefCOCO's boxes as training data: what is asked about them, what is drawn, and the real xtuner 0.1.23 beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from typer.testing import CliRunner

from llava_convert.cli import app
from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.resources import training
from tests.interop.peer_programs import in_peer
from tests.training.drawn import draw, recipe
from tests.training.programs import furthest, losses, xtuner

recipes, rows = training("recipe"), training("rows")
SIZES = ((72, 56), (56, 80), (64, 64))
SETS = (
    recipes.DataSet("boxes", "boxes.json", format="refcoco", max_rows=20),
    recipes.DataSet("names", "boxes.json", format="refcoco_inverse", max_rows=9, repeats=2),
    recipes.DataSet("all", "train.json"),
)


def box(number: int, **more: Any) -> dict[str, Any]:
    """A box in a picture of `draw`, as xtuner's convert_refcoco.py writes it."""
    width, height = SIZES[number % 3]
    place = [number + 0.5, 3.25, 20.0, 30 + number / 3]
    found = {"id": f"b{number}", "image": f"{number}.png", "sents": f"the old hat {number}", "bbox": place}
    return {**found, "width": width, "height": height, **more}


def boxes(folder: Path, *more: dict[str, Any]) -> Path:
    """The data of `draw`, and a file of boxes in the same pictures; the last is described at great length."""
    draw(folder)
    long = box(7, sents="a small red boat of old trees " * 40)
    (folder / "boxes.json").write_text(json.dumps([*(box(number) for number in range(7)), long, *more]))
    return folder


def run_on(tiny: Path, folder: Path, **train: Any) -> Any:
    chosen = recipe(tiny, folder, "full_vitlora", seed=11, **train)
    data = replace(chosen.data, sets=SETS, prompt_template="vicuna", max_length=200)
    return replace(chosen, data=data)


def test_what_is_asked_about_a_box(tmp_path: Path) -> None:
    """Corners are hundredths of the picture, rounded down; each box is asked about in seven wordings."""
    value = {"image": "a.jpg", "sents": "the {cat}", "bbox": [64.0, 96.5, 192, 240], "width": 640, "height": 480}
    (tmp_path / "a.json").write_text(json.dumps([value, value]))
    where = list(rows.read_rows(tmp_path / "a.json", "refcoco"))
    what = list(rows.read_rows(tmp_path / "a.json", "refcoco_inverse"))
    assert [one.number for one in where] == [one.number for one in what] == [1] * 7 + [2] * 7
    assert {one.image for one in (*where, *what)} == {"a.jpg"}
    place = "{<10><20><40><70>}"
    assert where[2].messages == (("human", "[refer] where is the {cat} ?\n<image>"), ("gpt", place))
    assert what[5].messages == (("human", f"[identify] this {place} is\n<image>"), ("gpt", "the {cat}"))
    assert len({one.messages[0] for one in (*where, *what)}) == 14


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bbox": [1, 2, 3]}, "row 1: not a box of RefCOCO: `bbox` is not four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "`bbox` is not four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "`bbox` is not four numbers"),
        ({"width": 0}, "`width` and `height` of the picture are not numbers above 0"),
        ({"height": None}, "`width` and `height` of the picture are not numbers above 0"),
        ({"sents": ["a cat"]}, "`sents` is not text"),
        ({"image": ["a.png", "b.png"]}, "it is about 2 pictures"),
    ],
)
def test_what_is_no_box(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([box(0, **wrong)]))
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        list(rows.read_rows(tmp_path / "a.json", "refcoco"))


def test_formats_that_do_not_exist() -> None:
    data = recipes.DataRecipe((recipes.DataSet("a", "a.json", format="refcoco+"),))
    with pytest.raises(UsageError, match=r"data\.set\.format must be one of conversations, refcoco, refcoco_inverse"):
        recipes.Recipe("r", recipes.ModelRecipe("llm", "vit"), data)


def test_data_check_and_dry_run(tiny: Path, tmp_path: Path) -> None:
    """Both count what is drawn: 20 of 56, of which those of the eighth box have no answer; 9 twice; and 8."""
    folder = boxes(tmp_path / "data")
    (tmp_path / "r.toml").write_text(recipes.as_toml(run_on(tiny, folder)))
    found = CliRunner().invoke(app, ["data", "check", str(tmp_path / "r.toml"), "--open"])
    assert found.exit_code == 0
    assert "boxes: 56 rows, 49 to train on, 49 about a picture, all pictures can be read" in found.stdout
    assert "left out: 7 rows whose answer lies beyond max_length" in found.stdout
    data = conversations(tiny, run_on(tiny, folder))
    drawn = len(data) - 9 * 2 - 8
    assert 10 < drawn < 20 and f"  drawn from them: {drawn}, by train.seed" in found.stdout
    dry = CliRunner().invoke(app, ["train", str(tmp_path / "r.toml"), "--dry-run", "--json"])
    (stage,) = json.loads(dry.stdout)["stages"]
    assert stage["sets"] == {"boxes": drawn, "names": 18, "all": 8}
    assert stage["iterations"] == -(-len(data) // 2)


def conversations(tiny: Path, chosen: Any, cache: Path | None = None) -> Any:
    """The data as training reads them."""
    size = AutoConfig.from_pretrained(tiny / "vit").image_size
    processor = AutoImageProcessor.from_pretrained(tiny / "vit")
    pictures = training("data").Pictures(processor, chosen.data.pad_image_to_square, size)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    return training("data").Conversations(
        chosen.data, tokenizer, pictures, image_tokens=4, cache=cache, seed=chosen.train.seed
    )


def test_the_seed_draws(tiny: Path, tmp_path: Path) -> None:
    """The same for the same seed, from the cache too; other samples for another seed, and for each repeat."""
    chosen = run_on(tiny, boxes(tmp_path / "data"))
    other = replace(chosen, train=replace(chosen.train, seed=12))
    runs = (chosen, chosen, other)
    first, cached, others = (questions(conversations(tiny, one, tmp_path / "cache")) for one in runs)
    assert first == cached != others
    names = [ids for ids in first if ids not in questions(conversations(tiny, replaced(chosen, SETS[:1])))][:18]
    assert len(names) == 18 and names[:9] != names[9:]


def replaced(chosen: Any, sets: Any) -> Any:
    return replace(chosen, data=replace(chosen.data, sets=sets))


def questions(data: Any) -> list[list[int]]:
    return [data[i]["ids"].tolist() for i in range(len(data))]


def test_a_run_taken_up_is_the_same(tiny: Path, tmp_path: Path) -> None:
    chosen = run_on(tiny, boxes(tmp_path / "data"), max_iters=4)
    whole = training("train").train(chosen, tmp_path / "whole")
    (tmp_path / "work").mkdir()
    taken = Path(shutil.copy(tmp_path / "whole" / "iter_2.pth", tmp_path / "work"))
    again = training("train").train(chosen, tmp_path / "work", resume=True)
    assert furthest(whole, again) == 0.0
    assert furthest(whole, taken) > 1e-4


@pytest.mark.peers
def test_samples_are_the_real_ones(tiny: Path, tmp_path: Path) -> None:
    """Those that xtuner's own classes make of these files after the same seed, in their order."""
    chosen = run_on(tiny, boxes(tmp_path / "data"))
    config = tmp_path / "config.py"
    config.write_text(training("xtuner_config").as_xtuner_config(chosen, image_tokens=4))
    theirs = in_peer("xtuner", "read_data.py", {"config": str(config), "seed": 11}, tmp_path)
    ours = conversations(tiny, chosen)
    assert len(ours) == len(theirs["samples"]) > 35
    assert ours.lengths == theirs["lengths"]
    for number, other in enumerate(theirs["samples"]):
        mine = ours[number]
        assert mine["ids"].tolist() == other["ids"], number
        assert mine["labels"].tolist() == other["labels"], number
        assert mine["pixel_values"].flatten()[::97].tolist() == pytest.approx(other["pixels"], abs=1e-6), number


@pytest.mark.peers
def test_a_run_is_the_real_ones(tiny: Path, tmp_path: Path) -> None:
    """From equal weights: what xtuner draws after its Runner set the seed, in its order; and the losses."""
    folder = boxes(tmp_path / "data")
    start = training("train").train(run_on(tiny, folder, max_iters=2), tmp_path / "start")
    chosen = run_on(tiny, folder, save_steps=99)
    chosen = replace(chosen, model=replace(chosen.model, pretrained=str(start)))
    last = training("train").train(chosen, tmp_path / "work")
    job = {"train": str(tmp_path / "work" / "full_vitlora.py"), "work_dir": str(tmp_path / "other")}
    (theirs,) = xtuner(tmp_path / "jobs", job)
    assert len(theirs["losses"]) > 15
    assert theirs["losses"] == pytest.approx(losses(tmp_path / "work"), rel=1e-6)
    assert furthest(last, tmp_path / "other" / last.name) < 2e-6
