"""tiny-shapes from nothing: it learns, and whatever it is converted to answers as the checkpoint does.

The steps are the demo's, by the command line. A model that answers cannot have lost its adapter, a layer, a stop token
or its template on the way; the questions are about pictures that it was not trained on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from PIL import Image
from rich.console import Console

import llava_convert
from fixtures.demo import __main__ as demo
from fixtures.demo import runtimes
from llava_convert.app.ask.load import loaded
from llava_convert.app.ask.prompts import IMAGE
from llava_convert.app.options import AskOptions
from llava_convert.core.progress import reporter
from llava_convert.core.resources import training
from llava_convert.storage.torch.file import read_torch
from tests import zero_folders
from tests.interop.peer_programs import in_peer
from tests.training import letters

shapes = training("shapes")


@dataclass(frozen=True)
class Shown:
    """A finished demo: its folder, its questions, and every runtime's answers."""

    folder: Path
    runs: Path
    questions: list[demo.Question]
    answers: demo.Answers

    def share(self, runtime: str) -> float:
        return demo.right(self.questions, self.answers[runtime]).total() / len(self.questions)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    steps = demo.Demo(tmp_path_factory.mktemp("shapes"), Console(quiet=True))
    steps.train()
    steps.convert()
    return Shown(steps.folder, steps.runs, steps.questions(), steps.ask())


def test_it_learns(shown: Shown) -> None:
    """The first stage trains the projector of a frozen language model that knows no word yet."""
    assert len(shown.questions) == 192
    assert shown.share("before training") < 0.1 and shown.share("after pretrain") < 0.5
    assert shown.share(demo.TRAINED) >= 0.95


@pytest.mark.parametrize("layout", [demo.XTUNER, demo.OFFICIAL, demo.HF])
def test_a_layout_answers_as_the_checkpoint(shown: Shown, layout: str) -> None:
    assert shown.answers[layout] == shown.answers[demo.TRAINED]


def test_llama_cpp_answers_as_transformers_with_its_defect(shown: Shown) -> None:
    reference = shown.answers[demo.LIKE_LLAMA_CPP]
    assert demo.differing(shown.answers[demo.F16], reference) <= 1  # where two answers are as likely as each other
    assert demo.differing(shown.answers[demo.Q8_0], reference) <= 0.05 * len(shown.questions)
    # So that the comparison says something: the defect changes many answers.
    assert demo.differing(reference, shown.answers[demo.HF]) > 0.1 * len(shown.questions)


def test_gguf_and_back_answers_as_before(shown: Shown, tmp_path: Path) -> None:
    """No defect is in the files: in transformers again, they answer as the checkpoint does.

    The weights are the same bits. Where two answers are as likely as each other, where a tensor lies in memory decides
    which kernel adds up in which order: seen for one question of 192 on one type of CPU, for none on others.
    """
    gguf = shown.folder / "gguf" / "tiny-shapes-f16.gguf"
    llava_convert.convert(gguf, to="hf", out=tmp_path / "back")
    answers = demo.answers_to(shown.questions, runtimes.hf(tmp_path / "back"))
    assert llava_convert.verify(gguf, tmp_path / "back").same
    assert demo.differing(answers, shown.answers[demo.HF]) <= 1


@pytest.mark.parametrize("form", ["zero", "peft"])
def test_a_form_of_training_answers_as_the_trainer(
    shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """As `chat` and `eval` load it, with no conversion of it on disk."""
    monkeypatch.chdir(shown.folder)  # where the paths of its bases begin
    pth = next((shown.runs / "finetune").glob("iter_*.pth"))
    assert answers_of(*saved_as(form, pth, tmp_path), shown.questions) == shown.answers[demo.TRAINED]


def saved_as(form: str, pth: Path, folder: Path) -> tuple[Path, AskOptions]:
    """A checkpoint as DeepSpeed saves it, or as an adapter of its tower beside the model without that."""
    state = training("checkpoint").read_checkpoint(pth).state
    meta = {"cfg": read_torch(pth).root["meta"]["cfg"]}
    if form == "zero":
        save = zero_folders.Save(state, stage=3, ranks=2, meta=meta)
        return zero_folders.write(folder / pth.name, save), AskOptions()
    if form == "peft":
        llava_convert.convert(pth, to="peft", out=folder / "peft", part="visual-encoder", dtype="float32")
        bare = {n: t.zero_() if ".lora_B." in n else t for n, t in state.items()}
        torch.save({"state_dict": bare, "meta": meta}, folder / pth.name)
        llava_convert.convert(folder / pth.name, to="hf", out=folder / "base", dtype="float32")
        return folder / "peft", AskOptions(base=str(folder / "base"))
    raise AssertionError(form)


def answers_of(source: Path, options: AskOptions, questions: list[demo.Question]) -> list[str]:
    asked = replace(options, device="cpu", runtime="transformers")
    with loaded(source, asked, reporter(None)) as model:
        return [
            model.runtime.answer(
                [{"role": "user", "content": f"{IMAGE}\n{question.text}"}], [question.image()], limit=8
            ).text
            for question in questions
        ]


@dataclass(frozen=True)
class Lettered:
    """tiny-shapes once it knows letters: the checkpoint, the TSV, and what the trainer's evaluation has it answer."""

    pth: Path
    data: Path
    answers: list[str]


@pytest.fixture(scope="module")
def lettered(shown: Shown) -> Lettered:
    before = next((shown.folder / shown.runs / "finetune").glob("iter_*.pth")).relative_to(shown.folder)
    recipe, data = letters.prepare(shown.folder, before=str(before), iterations=120)
    demo.Demo(shown.folder, Console(quiet=True)).command("train", recipe.name)
    (pth,) = (shown.folder / "work_dirs" / letters.NAME).glob("iter_*.pth")
    (line,) = (pth.parent / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    return Lettered(pth, data, [one["answer"] for one in json.loads(line)["answers"]])


FORMS = ("pth", "zero", "xtuner", "official", "hf", "peft", "gguf")


@pytest.mark.peers
def test_every_form_scores_as_the_real_xtuner(
    shown: Shown, lettered: Lettered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One TSV of held-out pictures: every answer is the trainer's own, every score that of xtuner's own `mmbench`."""
    monkeypatch.chdir(shown.folder)
    vit, found = shown.folder / shown.runs / "base" / "vit", {}
    for form in FORMS:
        source, options = form_of(form, lettered.pth, tmp_path / form, vit)
        found[form] = llava_convert.mmbench(source, data=lettered.data, work_dir=tmp_path / f"{form} w", **options)
    words = [str(tmp_path / "xtuner" / "m"), "--llava", str(tmp_path / "xtuner" / "m"), "--visual-encoder", str(vit)]
    words += ["--prompt-template", "llama3_chat", "--torch-dtype", "fp32", "--data-path", str(lettered.data)]
    words += ["--work-dir", str(tmp_path / "theirs"), "--max-new-tokens", "4"]
    theirs = in_peer("xtuner", "run_xtuner_mmbench.py", {"words": words}, tmp_path)
    assert [row["prediction"] for row in theirs["rows"]] == lettered.answers
    assert set(lettered.answers) == {"A", "B", "C", "D"} and 0.2 < theirs["scores"]["Average"] < 1
    for form in FORMS:
        table = pandas.read_excel(tmp_path / f"{form} w" / "mmbench_result.xlsx", keep_default_na=False)
        assert json.loads(table.to_json(orient="records", force_ascii=False)) == theirs["rows"], form
        assert found[form].scores == theirs["scores"], form
    kept = tmp_path / "pth w" / "answers-0.jsonl"
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])  # as a kill leaves it, within a line
    source, options = form_of("pth", lettered.pth, tmp_path / "pth", vit)
    again = llava_convert.mmbench(source, data=lettered.data, work_dir=tmp_path / "pth w", **options)
    assert len(lettered.answers) / 3 < again.resumed < len(lettered.answers) / 1.5
    assert again.scores == theirs["scores"]


def form_of(form: str, pth: Path, folder: Path, vit: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint in a form, in float32, and what has to be told to open it."""
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"device": "cpu", "max_new_tokens": 4}
    if form == "pth":
        return pth, options
    if form in ("zero", "peft"):
        source, asked = saved_as(form, pth, folder)
        return source, options | ({"base": asked.base} if asked.base else {})
    types = {"outtype": "f32", "mmproj_outtype": "f32"} if form == "gguf" else {"dtype": "float32"}
    llava_convert.convert(pth, to=form, out=folder / "m", **types)
    if form == "gguf":
        return folder / "m", options | {"runtime": "transformers"}
    return folder / "m", options | ({} if form == "hf" else {"visual_encoder": str(vit)})


@pytest.mark.peers
def test_the_real_llava_answers_as_the_checkpoint(shown: Shown, tmp_path: Path) -> None:
    """LLaVA's own loader and code, on transformers 4.37."""
    shutil.copytree(shown.folder / shown.runs / "base" / "vit", tmp_path / "tiny-shapes" / "vit")  # by its id
    start, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    head, tail = start.format("user") + "<image>\n", end + start.format("assistant")
    questions = [(str(q.picture), head + q.text + tail) for q in shown.questions]
    job = {"folder": str(shown.folder / "official"), "questions": questions}
    found = in_peer("llava", "ask_official.py", job, tmp_path)
    assert found["answers"] == shown.answers[demo.TRAINED]


def test_the_contact_sheet(shown: Shown, tmp_path: Path) -> None:
    demo.sheet(shown.questions, shown.answers, tmp_path / "answers.png")
    with Image.open(tmp_path / "answers.png") as sheet:
        colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert sheet.width > 1000 and colours[(20, 130, 60)] > 1000 and colours[(200, 40, 40)] > 20


def test_held_out_pictures_are_not_trained_on(tmp_path: Path) -> None:
    """No combination is in both parts; every word that is asked for is learnt."""
    known, kept = shapes.scenes()
    assert not set(known) & set(kept) and len(known) + len(kept) == 6 * 3 * 4 * 4
    for kind in shapes.QUESTIONS:
        assert {scene.answer(kind) for scene in kept} <= {scene.answer(kind) for scene in known}
    shapes.build(tmp_path / "one", seed=3, pictures=6)
    shapes.build(tmp_path / "two", seed=3, pictures=6)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 50
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    held = json.loads((tmp_path / "one" / "held_out.json").read_text())
    trained = json.loads((tmp_path / "one" / "finetune.json").read_text())
    assert not {row["image"] for row in held} & {row["image"] for row in trained}


def test_the_demo_sees_wrong_answers(tmp_path: Path) -> None:
    questions = [demo.Question(tmp_path, "colour", "?", "red") for _ in range(100)]
    good = {name: ["red"] * 100 for name in (demo.TRAINED, demo.LIKE_LLAMA_CPP, *demo.SAME_AS)}
    assert demo.troubles(questions, good) == []
    one_off = ["red"] * 99 + ["blue"]
    assert "1 of 100 answers" in demo.troubles(questions, {**good, demo.OFFICIAL: one_off})[0]
    assert demo.troubles(questions, {**good, demo.Q8_0: one_off}) == []
    assert demo.agreement(questions, {**good, demo.HF: one_off})[2] == (
        "hf, transformers: 99 of 100 answers are those of “" + demo.TRAINED + "”."
    )
    bad = demo.troubles(questions, {name: ["blue"] * 100 for name in good})
    assert bad == ["the trained model answers 0% of the held-out questions, and 95% were wanted"]
