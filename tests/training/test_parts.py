"""The trainer's parts: recipes, data, the order of samples, the schedule, and what goes wrong."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import llava_convert
from llava_convert.assets.processor import squared
from llava_convert.assets.prompts import prompt_template
from llava_convert.cli import app
from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.resources import training
from llava_convert.layouts.training_config import parse_training_config
from tests.training.drawn import draw, recipe

data, recipes, rows_of, sampler = training("data"), training("recipe"), training("rows"), training("sampler")
talk = training("conversations")


# --- recipes


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_is_read_and_written(name: str, tmp_path: Path) -> None:
    for stage in recipes.load_recipe(name):
        (tmp_path / "again.toml").write_text(recipes.as_toml(stage))
        assert recipes.load_recipe(str(tmp_path / "again.toml")) == (stage,)
        text = training("xtuner_config").as_xtuner_config(stage)
        compile(text, name, "exec")


def test_the_recipes_have_the_originals_numbers() -> None:
    (found,) = recipes.load_recipe(
        "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_internvl_finetune"
    )
    assert (found.train.batch_size, found.train.accumulate, found.train.lr) == (4, 4, 2e-5)
    assert found.model.visual_encoder_lora == recipes.Lora(r=64, alpha=16, dropout=0.05)
    assert (found.data.max_length, len(found.data.sets), found.model.freeze_llm) == (4096, 9, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.lrr=1", "nearest: train.lr"), ("lr=fast", "must be a number"),
        ("train.betas=[0.9]", "must be a list of 2"),
        ("model.llm_lora.x=1", "model.llm_lora.x"),
        ("learning_rate=1e-4", "nearest: train.lr"), ("finetun.train.lr=1", "nearest: finetune.train.lr"),
        ("train.num_train_epochs=3", "nearest: train.epochs"), ("data.prompt_template=llama3", "nearest: llama3_chat"),
        ("keep=0", "-1 to keep all"), ("warmup_ratio=2", "below 1"), ("lr=nan", "above 0"), ("epochs=0", "above 0"),
        ("data.sampler=random", "length_grouped, shuffle"), ("model.attention=flash", "flash_attention_2"),
        ("trackers=['mlflow']", "wandb"), ("eval.every=-1", "at least 0"), ("model.llm_lora.r=0", "at least 1"),
        ("train.dtype=fp8", "fp32, bf16, fp16"), ("lr", "it is key=value"), ("data.workers=1.5", "whole number"),
    ],
)  # fmt: skip
def test_wrong_changes(change: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.load_recipe("tiny-shapes", [change])
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_changes() -> None:
    first, second = recipes.load_recipe("tiny-shapes", ["lr=1e-5", "finetune.train.batch_size=3", "data.root=/x y"])
    assert (first.train.lr, second.train.lr, first.data.root) == (1e-5, 1e-5, "/x y")
    assert (first.train.batch_size, second.train.batch_size) == (32, 3)
    with pytest.raises(InputError, match="no recipe tiny"):
        recipes.load_recipe("tiny")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llava_lama3", "llava_llama3_8b_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain"),
        ("llava_v15_7b_finetune_lra", "llava_v15_7b_finetune_lora"),
        ("phi3_finetune", "llava_phi3_mini_4k_instruct_full_clip_vit_large_p14_336_e1_gpu8_finetune"),
        ("tiny", "tiny-shapes"),
    ],
)
def test_near_recipes(typed: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        recipes.load_recipe(typed)
    assert f"nearest: {meant};" in str(caught.value.hint)


def test_the_config_is_read_without_running_it(tmp_path: Path) -> None:
    (found,) = recipes.load_recipe("llava_llama3_8b_instruct_qlora_clip_vit_large_p14_336_e1_gpu1_finetune")
    text = training("xtuner_config").as_xtuner_config(found)
    read = parse_training_config(text, "config.py")
    assert read.llm == "meta-llama/Meta-Llama-3-8B-Instruct" and read.freeze_llm


def test_the_config_says_what_is_trained() -> None:
    """Lengths without the picture's tokens, iterations where the recipe counts them, paths as joined."""
    name = "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_internvl_finetune"
    (found,) = recipes.load_recipe(name, ["train.max_iters=101", "data.root="])
    sets = (recipes.DataSet("a", "/abs/a.json", "images"), recipes.DataSet("b", "b.json", "/abs"))
    found = replace(found, data=replace(found.data, sets=sets))
    text = training("xtuner_config").as_xtuner_config(found, image_tokens=576)
    said: dict[str, Any] = {}
    for line in text.splitlines():
        key, _, value = line.strip().rstrip(",").partition("=")
        said.setdefault(key.strip(), []).append(value.strip())
    assert said["max_length"][0] == str(4096 - 576)
    assert said["data_root"] == ["'./'"]
    assert said["data_path"] == ["'/abs/a.json'", "data_root + 'b.json'"]
    assert said["image_folder"] == ["data_root + 'images'", "'/abs'"]
    assert "train_cfg = dict(type=TrainLoop, max_iters=101)" in text and said["end"] == ["3)", "101)]"]
    (whole,) = recipes.load_recipe(name)
    assert "train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)" in training("xtuner_config").as_xtuner_config(
        whole
    )


@pytest.mark.parametrize("beside", [True, False])
def test_the_checkpoint_converts_from_anywhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """Bases named from the folder that training ran in, the work_dir in it or elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(tiny, here / "models")
    elsewhere.mkdir()
    chosen = tiny_recipe(tiny, here, [GOOD])
    chosen = replace(chosen, model=replace(chosen.model, llm="models/llm", visual_encoder="models/vit"))
    monkeypatch.chdir(here)
    last = training("train").train(chosen, Path("w") if beside else tmp_path / "w").absolute()
    read = parse_training_config(last.with_name("t.py").read_text(), "t.py")
    assert read.llm == ("models/llm" if beside else str(here / "models/llm"))
    monkeypatch.chdir(elsewhere)
    found = CliRunner().invoke(app, ["pth", str(last), "--to", "official", "-o", str(elsewhere / "out")])
    assert found.exit_code == 0, found.output
    assert json.loads((elsewhere / "out" / "config.json").read_text())["hidden_size"] == 64


# --- conversations


class Words:
    """A tokenizer of one id a word: enough to see what is put where."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.words.setdefault(w, len(self.words) + 10) for w in text.split()]

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(t) for t in texts]}

    def __len__(self) -> int:
        return 10 + len(self.words)


def row(*said: str, image: str | None = "a.png") -> dict[str, Any]:
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)]
    return {"conversations": turns} | ({"image": image} if image else {})


def turns_of(value: dict[str, Any], template: Any) -> Any:
    (row,) = rows_of.rows_of(value, "conversations", Path("d.json"), 1, 1)
    found, left_out = talk.turns_of(row, template, Path("d.json"))
    assert left_out == ()
    return found


def test_the_picture_goes_to_the_front() -> None:
    (turn,) = turns_of(row("What is it? <image>", "A cat."), prompt_template("vicuna"))
    assert turn.asked == "USER: <image>\nWhat is it? ASSISTANT:" and turn.answer == "A cat."


def test_only_answers_are_learnt() -> None:
    words = Words()
    encoder = talk.Encoder(words, prompt_template("vicuna"), 100)
    turns = turns_of(row("<image>\nhi", "yes no", "more", "ok"), prompt_template("vicuna"))
    ((ids, learnt),) = encoder([turns])
    text = {i: w for w, i in words.words.items()} | {1: "<s>", 2: "</s>", talk.IMAGE_INDEX: "<image>"}
    assert [text[i] for i in ids] == [
        "<s>", "USER:", "<image>", "hi", "ASSISTANT:", "yes", "no", "</s>",
        "<s>", "USER:", "more", "ASSISTANT:", "ok", "</s>",
    ]  # fmt: skip
    assert [text[i] for i, learn in zip(ids, learnt, strict=True) if learn] == ["yes", "no", "</s>", "ok", "</s>"]
    assert len(talk.Encoder(words, prompt_template("vicuna"), 5)([turns])[0][0]) == 5


def test_plain_is_the_picture_and_the_caption() -> None:
    words = Words()
    turns = turns_of(row("Render a caption. <image>", "a cat"), talk.PLAIN)
    ((ids, learnt),) = talk.Encoder(words, talk.PLAIN, 100)([turns])
    assert ids == [1, talk.IMAGE_INDEX, *words.encode("a cat")] and learnt == [False, False, True, True]


def test_pictures_become_squares() -> None:
    wide = squared(Image.new("RGB", (6, 2), "red"), (1, 2, 3))
    assert wide.size == (6, 6) and wide.getpixel((0, 0)) == (1, 2, 3) and wide.getpixel((0, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{]", "not JSON"), ('{"a": 1}', "not a list"), ('[{"conversations": 3}]', "row 1: not a conversation"),
        ('[{"image": 3, "conversations": []}]', "row 1"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=said):
        list(rows_of.read_rows(tmp_path / "a.json"))
    with pytest.raises(InputError, match="no such data file"):
        list(rows_of.read_rows(tmp_path / "b.json"))


# --- the order


def reference_order(lengths: list[int], batch: int, seed: int) -> list[int]:
    """xtuner's get_length_grouped_indices for samples of one modality, spelled out."""
    mega = max(1, min(len(lengths) // (batch * 4), 50)) * batch
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [sorted(shuffled[i : i + mega], key=lambda j: -lengths[j]) for i in range(0, len(shuffled), mega)]
    tallest = max(range(len(groups)), key=lambda g: lengths[groups[g][0]])
    groups[0][0], groups[tallest][0] = groups[tallest][0], groups[0][0]
    return [i for group in groups for i in group]


@pytest.mark.parametrize("count", [5, 64, 333])
def test_order_of_one_modality(count: int) -> None:
    lengths = [(i * 37) % 91 + 1 for i in range(count)]
    assert sampler.grouped_order(lengths, 4, seed=7) == reference_order(lengths, 4, 7)


def test_batches_are_of_one_modality_and_processes_share_them() -> None:
    lengths = [(i * 37 % 91 + 1) * (1 if i % 3 else -1) for i in range(400)]
    halves = [sampler.LengthGrouped(lengths, 4, seed=3, rank=r, world=2) for r in (0, 1)]
    epochs = [half.epoch(0) for half in halves]
    assert len(epochs[0]) == len(epochs[1]) == 200 and set(epochs[0]) | set(epochs[1]) == set(range(400))
    together = [i for pair in zip(*epochs, strict=True) for i in pair]
    mixed = sum(len({lengths[i] > 0 for i in together[n : n + 8]}) > 1 for n in range(0, 400, 8))
    # What is left of either kind behind its last megabatch of 96 (75 and 37 samples) goes together at the end.
    assert mixed <= (75 + 37) // 8
    later = iter(sampler.Batches(halves[0], 2, start=75))
    assert [i for _ in range(30) for i in next(later)] == (epochs[0] + halves[0].epoch(1))[150:210]


def test_a_plain_shuffle() -> None:
    """Each epoch ends with what is left, in a smaller batch; processes share one order."""
    order = sampler.Shuffled(9, seed=7)
    assert order.epoch(1) == torch.randperm(9, generator=torch.Generator().manual_seed(8)).tolist()
    batches = sampler.Batches(order, 2, start=4)
    assert len(batches) == 5
    found = iter(batches)
    assert [next(found) for _ in range(3)] == [order.epoch(0)[8:], order.epoch(1)[:2], order.epoch(1)[2:4]]
    halves = [sampler.Shuffled(9, seed=7, rank=rank, world=2).epoch(0) for rank in (0, 1)]
    assert [i for pair in zip(*halves, strict=True) for i in pair] == [*order.epoch(0), order.epoch(0)[0]]


def test_the_schedule() -> None:
    schedule = training("schedule").Schedule(1e-3, 100, 10, 1e-5)
    rates = [schedule.at(i) for i in range(100)]
    assert rates[0] == pytest.approx(1e-8) and rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5e-4) and rates[99] < 1e-6 and rates[10:] == sorted(rates[10:], reverse=True)


# --- what goes wrong


def tiny_recipe(tiny: Path, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    (folder / "d.json").write_text(json.dumps(rows))
    Image.new("RGB", (40, 30), "blue").save(folder / "a.png")
    return recipes.Recipe(
        "t",
        recipes.ModelRecipe(str(tiny / "llm"), str(tiny / "vit")),
        recipes.DataRecipe(
            (recipes.DataSet("d", "d.json"),), root=str(folder), workers=changes.pop("workers", 0), **changes
        ),
        recipes.TrainRecipe(batch_size=1, save_steps=1, dtype="fp32", max_iters=3, warmup_ratio=0.0),
    )


GOOD = row("<image>\nWhat?", "A boat.")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no conversation with an answer"),
        ([row("<image>\nWhat?", "A boat.", image="no/such.png")], "none of its pictures"),
        ([row("<image>\nWhat? ", "A", "<image>\nand?", "B")], "row 1: 2 <image> in its questions, 1 pictures"),
        ([row("<image>\nWhat?", "A", image=None)], "row 1: 1 <image> in its questions, 0 pictures"),
    ],
)
def test_data_that_cannot_be(tiny: Path, tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        training("train").train(tiny_recipe(tiny, tmp_path, rows), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named(tiny: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows = [GOOD, row("<image>\nWhat?", "A hat.", image="broken.png")]
    with pytest.raises(InputError) as caught:
        training("train").train(tiny_recipe(tiny, tmp_path, rows, workers=workers), tmp_path / "w")
    assert "d.json: row 2: picture" in caught.value.message and "broken.png" in caught.value.message
    last = training("train").train(tiny_recipe(tiny, tmp_path, rows, on_bad_image="skip"), tmp_path / "w2")
    assert last.name == "iter_3.pth"


@pytest.mark.parametrize(("what", "factor"), [("loss", float("nan")), ("gradient's norm", 1.0)])
def test_what_is_not_finite(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, factor: float
) -> None:
    """It ends the run at once; the checkpoint before it stays."""
    model = training("model")
    real, calls = model.Llava.forward, []

    def forward(self: Any, **batch: Any) -> torch.Tensor:
        calls.append(1)
        loss: torch.Tensor = real(self, **batch)
        # The root of nothing is nothing, its slope is not.
        return loss * factor + (self.projector.model[0].bias * 0).sum().sqrt() if len(calls) == 2 else loss

    monkeypatch.setattr(model.Llava, "forward", forward)
    with pytest.raises(InputError, match=f"the {what} of iteration 2 is nan") as caught:
        training("train").train(tiny_recipe(tiny, tmp_path, [GOOD]), tmp_path / "w")
    assert "iter_1.pth" in str(caught.value.hint)
    assert sorted(p.name for p in (tmp_path / "w").glob("*.pth")) == ["iter_1.pth"]


@pytest.mark.parametrize("part", ["llm", "visual_encoder"])
def test_a_base_that_is_not_there(tiny: Path, tmp_path: Path, part: str) -> None:
    chosen = tiny_recipe(tiny, tmp_path, [GOOD])
    (tmp_path / "r.toml").write_text(recipes.as_toml(chosen))
    words = ["train", str(tmp_path / "r.toml"), "--work-dir", str(tmp_path / "w")]
    found = CliRunner().invoke(app, [*words, "--set", f"model.{part}={tmp_path / 'gone'}"])
    assert found.exit_code == 3 and f"{tmp_path / 'gone'}: there is no such folder" in found.output.replace("\n", "")


def test_the_printed_next_step_is_done(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder whose name the shell would cut."""
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(recipes.as_toml(tiny_recipe(tiny, tmp_path, [GOOD])))
    done = CliRunner().invoke(app, ["train", "r.toml", "--work-dir", "my run"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    program, *words = shlex.split(line.removeprefix("next: "))
    assert program == "llava-convert" and "my run" in " ".join(words)
    assert CliRunner().invoke(app, words).exit_code == 0


def test_taken_up_with_another_recipe(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Other parts are an error, other settings are told; a finished run says so and does nothing."""
    train = training("train").train
    first = recipe(tiny, draw(tmp_path / "data"), "pretrain")
    train(first, tmp_path / "w")
    (tmp_path / "w" / "iter_4.pth").unlink()
    with pytest.raises(InputError, match="lacks 57 tensors which this recipe trains, for instance visual_encoder"):
        train(recipe(tiny, tmp_path / "data", "full_vitlora"), tmp_path / "w", resume=True)
    capfd.readouterr()
    train(replace(first, train=replace(first.train, lr=5e-4)), tmp_path / "w", resume=True)
    assert "the recipe is another than that of" in (said := capfd.readouterr().err) and "lr = 0.0005" in said
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    assert train(first, tmp_path / "w", resume=True) == tmp_path / "w" / "iter_4.pth"
    assert "iter_4.pth: trained to the end (4 iterations), nothing is left to do" in capfd.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    whole = recipe(tiny, tmp_path / "data", "full_vitlora")
    train(replace(whole, train=replace(whole.train, max_iters=2)), tmp_path / "v")
    with pytest.raises(InputError, match="36 tensors do not fit this model"):
        train(first, tmp_path / "v", resume=True)


def test_keep_and_prune(tiny: Path, tmp_path: Path) -> None:
    training("train").train(tiny_recipe(tiny, tmp_path, [GOOD, row("Hi", "Ho", image=None)]), tmp_path / "w")
    assert sorted(p.name for p in (tmp_path / "w").glob("*.pth")) == ["iter_2.pth", "iter_3.pth"]
    log = [json.loads(line) for line in (tmp_path / "w" / "log.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in log] == [1, 2, 3] and all(r["loss"] > 0 and r["eta"] >= 0 for r in log)
    assert Image.open(tmp_path / "w" / "loss.png").size == (900, 480)


@pytest.mark.parametrize("layout", ["pth", "xtuner"])
def test_stage_one_reaches_every_part(tiny: Path, tmp_path: Path, layout: str) -> None:
    """The projector and the adapters, which xtuner's LLaVAModel takes from a `pretrained_pth` too."""
    first = recipe(tiny, draw(tmp_path / "data"), "llmlora_vitlora")
    last = training("train").train(first, tmp_path / "w")
    source = last
    if layout == "xtuner":
        source = tmp_path / "folder"
        llava_convert.convert(last, to="xtuner", out=source, dtype="float32")
    second = training("model").Llava(replace(first.model, pretrained=str(source))).state_dict()
    trained = training("checkpoint").read_checkpoint(last).state
    assert all(torch.equal(second[name], tensor) for name, tensor in trained.items())
    assert float(trained["llm.base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"].abs().max()) > 0


# --- 4-bit bases


@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 16, "dropout": 0.0}])
def test_a_base_in_four_bits(golden: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    """QLoRA, and a projector before a language model in nf4: near what the same run does without, and it learns."""
    first = {}
    for kind in ("nf4", ""):
        chosen = recipes.Recipe(
            "q",
            recipes.ModelRecipe(
                str(golden / "parts/plain/llm"), str(golden / "parts/plain/vit"), llm_dtype="bf16", quantization=kind,
                llm_lora=None if lora is None else recipes.Lora(**lora),
            ),
            recipes.DataRecipe(
                (recipes.DataSet("all", "train.json"),), root=str(golden / "parts/plain/data"), workers=0
            ),
            recipes.TrainRecipe(batch_size=2, lr=5e-3, epochs=5, warmup_ratio=0.0, dtype="bf16"),
        )  # fmt: skip
        last = training("train").train(chosen, tmp_path / f"run-{kind}")
        losses = [json.loads(line)["loss"] for line in (last.parent / "log.jsonl").read_text().splitlines()]
        first[kind] = losses[0]
        assert sum(losses[-4:]) < sum(losses[:4]) - (0.1 if lora else 0.02)
        trained = training("checkpoint").read_checkpoint(last).state
        assert {name.split(".")[0] for name in trained} == ({"llm", "projector"} if lora else {"projector"})
        assert all(".lora_" in name for name in trained if name.startswith("llm."))
    assert 0 < abs(first["nf4"] - first[""]) < 0.05


def test_a_base_in_four_bits_without_the_package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = training("model")
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    chosen = tiny_recipe(tiny, tmp_path, [GOOD])
    chosen = replace(chosen, model=replace(chosen.model, quantization="nf4"))
    with pytest.raises(UsageError, match="needs bitsandbytes") as caught:
        training("train").train(chosen, tmp_path / "w")
    assert "llava-convert[qlora]" in str(caught.value.hint)


def test_a_warm_up_of_one_iteration_is_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tiny_recipe(tiny, tmp_path, [GOOD])
    short = replace(chosen.train, warmup_ratio=0.4)
    training("train").train(replace(chosen, train=replace(short, mmengine_warmup=True)), tmp_path / "w")
    assert "a warm-up of one iteration leaves the rate at 1.0e-08" in capsys.readouterr().err
    training("train").train(replace(chosen, train=short), tmp_path / "plain")
    assert "warm-up" not in capsys.readouterr().err
    rates = [json.loads(line)["lr"] for line in (tmp_path / "plain" / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4])
    assert "LinearLR," not in (tmp_path / "plain" / "t.py").read_text().partition("param_scheduler")[2]


# --- the command


def test_dry_run_and_wrong_words(tiny: Path, tmp_path: Path) -> None:
    chosen = tiny_recipe(tiny, tmp_path, [GOOD])
    (tmp_path / "r.toml").write_text(recipes.as_toml(chosen))
    found = CliRunner().invoke(app, ["train", str(tmp_path / "r.toml"), "--dry-run", "--json"])
    assert found.exit_code == 0
    (stage,) = json.loads(found.stdout)["stages"]
    assert (stage["sets"], stage["iterations"], stage["parameters"]["projector"]["trained"]) == ({"d": 1}, 3, 6272)
    assert CliRunner().invoke(app, ["train", "no-such"]).exit_code == 3
    assert CliRunner().invoke(app, ["train", str(tmp_path / "r.toml"), "--set", "x.y=1"]).exit_code == 2


def test_what_a_later_stage_lacks_is_told_first(tiny: Path, tmp_path: Path) -> None:
    text = recipes.as_toml(tiny_recipe(tiny, tmp_path, [GOOD]))
    later = '[[stage]]\nname = "one"\n[[stage]]\nname = "two"\n[stage.data]\nset = [{ name = "x", file = "no.json" }]\n'
    (tmp_path / "r.toml").write_text(text + later)
    found = CliRunner().invoke(app, ["train", str(tmp_path / "r.toml"), "--work-dir", str(tmp_path / "w")])
    assert found.exit_code == 3 and "no.json: no such data file" in found.stderr
    assert not (tmp_path / "w").exists()


def test_data_check(tiny: Path, tmp_path: Path) -> None:
    chosen = tiny_recipe(tiny, tmp_path, [GOOD, row("<image>\nWhat?", "A", image="coco/train2017/1.jpg")])
    (tmp_path / "r.toml").write_text(recipes.as_toml(chosen))
    found = CliRunner().invoke(app, ["data", "check", str(tmp_path / "r.toml")])
    assert found.exit_code == 3
    assert "2 rows, 2 to train on, 2 about a picture, 1 pictures missing" in found.stdout
    assert "get it: http://images.cocodataset.org/zips/train2017.zip" in found.stdout
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/train2017/1.jpg").touch()
    assert CliRunner().invoke(app, ["data", "check", str(tmp_path / "r.toml")]).exit_code == 0


def test_data_check_of_a_set_that_is_not_here(tmp_path: Path) -> None:
    """The pictures that it will ask for are told too, but for those that are there."""
    (tmp_path / "llava_images/gqa/images").mkdir(parents=True)
    (tmp_path / "llava_images/gqa/images/1.jpg").touch()
    (tmp_path / "llava_images/coco/train2017").mkdir(parents=True)
    found = CliRunner().invoke(app, ["data", "check", "llava_v15_7b_finetune", "--set", f"data.root={tmp_path}"])
    assert found.exit_code == 3
    assert "llava_v1_5_mix665k.json: no such data file" in found.stdout
    for folder, told in (("coco/train2017", True), ("gqa/images", False), ("vg/VG_100K_2", True)):
        assert (f"llava_images/{folder}: no such folder, or nothing in it" in found.stdout) == told, folder
    assert "get it: https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip" in found.stdout


def test_data_check_of_a_recipe_that_makes_its_data() -> None:
    found = CliRunner().invoke(app, ["data", "check", "tiny-shapes"])
    assert found.exit_code == 0 and "tiny-shapes-finetune: makes its own data when it is trained" in found.stderr


def test_every_known_set_and_folder_can_be_had() -> None:
    """For every file of a recipe that comes with the package, and every folder that it asks for, there is a source."""
    sources = training("sources")
    for name in recipes.recipe_names():
        for stage in recipes.load_recipe(name):
            for one in stage.data.sets if stage.build is None else ():
                file = Path(stage.data.root) / one.file
                places = sources.expected(file, Path(stage.data.root) / one.images)
                assert places, one.file
                for place in (file, *places):
                    assert list(sources.advice(str(place), Path(stage.data.root))), place


def test_fix_ocrvqa(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.gif", "c.jpg"):
        (tmp_path / name).write_text(name)
    assert CliRunner().invoke(app, ["data", "fix-ocrvqa", str(tmp_path)]).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "a.png", "b.jpg", "c.gif", "c.jpg"]
    assert (tmp_path / "a.jpg").read_text() == "a.png" and (tmp_path / "c.jpg").read_text() == "c.jpg"
    assert CliRunner().invoke(app, ["data", "fix-ocrvqa", str(tmp_path / "no")]).exit_code == 3
