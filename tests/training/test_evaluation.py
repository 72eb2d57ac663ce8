"""What is asked of a run beside its loss: held-out conversations, rates of single parts, trackers, its size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, Phi3Config

from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.resources import training
from llava_convert.storage.torch.file import read_torch
from tests.training.drawn import draw, recipe
from tests.training.programs import environment, furthest, losses, train

recipes, sizes, checkpoint = training("recipe"), training("sizes"), training("checkpoint")


def evaluations(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / "eval.jsonl").read_text().splitlines()]


def with_sets(chosen: Any, **more: Any) -> Any:
    """The recipe with the held-out rows of `held.json`."""
    return replace(chosen, eval=recipes.EvalRecipe(sets=(recipes.DataSet("held", "held.json"),), **more))


def held_rows(data: Path, count: int) -> None:
    rows = json.loads((data / "train.json").read_text())
    (data / "held.json").write_text(json.dumps(rows[:count]))


def by_hand(chosen: Any, last: Path, tiny: Path) -> float:
    """The loss over all answers' tokens of the held-out rows: one at a time, from logits."""
    model = training("model").Llava(chosen.model).eval()
    model.load_trained(checkpoint.read_checkpoint(last).state, "")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    rows = json.loads((Path(chosen.data.root) / "held.json").read_text())
    found = []
    for row in rows:
        head, tail = "<|start_header_id|>user<|end_header_id|>\n\n", "\nWhat is it?<|eot_id|>"
        tail += "<|start_header_id|>assistant<|end_header_id|>\n\n"
        words = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (head, tail)]
        answer = tokenizer(row["conversations"][1]["value"] + "<|eot_id|>", add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *words[0], -200, *words[1], *answer]
        processor = training("train").AutoImageProcessor.from_pretrained(tiny / "vit")
        pixels = training("data").Pictures(processor, True, 0).load(Path(chosen.data.root) / row["image"])
        for place in range(len(answer)):
            seen = torch.tensor([ids[: len(ids) - len(answer) + place]])
            with torch.no_grad():
                logits = model(seen, None, torch.ones_like(seen, dtype=torch.bool), pixels[None])
            found.append(-float(logits[0].log_softmax(-1)[answer[place]]))
    return sum(found) / len(found)


def test_held_out_loss(tiny: Path, tmp_path: Path) -> None:
    """It is the mean over all answers' tokens, whatever the batches; the run goes on as if nothing were evaluated."""
    data = draw(tmp_path / "data")
    held_rows(data, 3)
    lora = {"visual_encoder_lora": {"r": 4, "dropout": 0.1}}
    plain = recipe(tiny, data, "full_vitlora", model=lora)
    chosen = with_sets(plain, every=3, max_tokens=4)
    training("train").train(plain, tmp_path / "plain")
    last = training("train").train(chosen, tmp_path / "w")
    assert losses(tmp_path / "w") == losses(tmp_path / "plain")
    assert furthest(last, tmp_path / "plain" / "iter_4.pth", every=True) == 0.0
    found = evaluations(tmp_path / "w")
    assert [row["iter"] for row in found] == [3, 4]
    assert found[-1]["loss"] == pytest.approx(by_hand(chosen, last, tiny), rel=1e-5)
    (tmp_path / "w" / "iter_4.pth").unlink()
    training("train").train(chosen, tmp_path / "w", resume=True)
    assert evaluations(tmp_path / "w") == found


def test_two_processes_evaluate_as_one(tiny: Path, tmp_path: Path) -> None:
    """Of five rows in batches of one, one process has nothing left in the last round."""
    data = draw(tmp_path / "data", alike=AutoTokenizer.from_pretrained(tiny / "llm"))
    held_rows(data, 5)
    chosen = with_sets(recipe(tiny, data, "pretrain", batch_size=1), every=99, answers=1, max_tokens=3)
    train(chosen, tmp_path / "two", processes=2)
    training("train").train(replace(chosen, train=replace(chosen.train, batch_size=2)), tmp_path / "one")
    ((one,), (two,)) = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) and two["answers"] == one["answers"]


def test_answers_are_those_that_were_learnt(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", 2)
    held_rows(data, 2)
    chosen = with_sets(recipe(tiny, data, "full_vitlora", lr=3e-3, epochs=60.0, save_steps=999), every=1000, answers=2)
    training("train").train(chosen, tmp_path / "w")
    (found,) = evaluations(tmp_path / "w")
    assert found["loss"] < 0.1
    for answer, row in zip(found["answers"], json.loads((data / "held.json").read_text()), strict=True):
        said = row["conversations"][1]["value"]
        assert answer["answer"] == answer["expected"] == said and "What is it?" in answer["question"]
        assert f"→ {said!r} (expected {said!r})" in capfd.readouterr().err or answer is not found["answers"][0]


def test_rows_are_held_out_of_the_data(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread evenly, and none of them is trained on; of too few the run is refused."""
    data = draw(tmp_path / "data", 9)
    chosen = replace(recipe(tiny, data, "pretrain", epochs=3.0), eval=recipes.EvalRecipe(every=99, rows=3, answers=0))
    every = training("data").Conversations
    taken: dict[int, set[int]] = {}
    getitem = every.__getitem__

    def noted(self: Any, at: int) -> Any:
        taken.setdefault(len(self), set()).add(self.index[at][0].rows[self.index[at][1]])
        return getitem(self, at)

    monkeypatch.setattr(every, "__getitem__", noted)
    training("train").train(chosen, tmp_path / "w")
    assert taken == {6: {2, 3, 5, 6, 8, 9}, 3: {1, 4, 7}}
    few = replace(chosen, eval=replace(chosen.eval, rows=5))
    with pytest.raises(InputError, match="9 conversations are too few to hold 5 of them out"):
        training("train").train(few, tmp_path / "v")


def test_a_rate_for_each_part(tiny: Path, tmp_path: Path) -> None:
    """The parts move as far as their rates let them; taken up again, the run ends with the same bits."""
    data = draw(tmp_path / "data")
    chosen = recipe(tiny, data, "full_fullvit", lr_llm=1e-9, lr_visual_encoder=1e-5, warmup_ratio=0.0)
    start = recipe(tiny, data, "full_fullvit", lr=1e-12, max_iters=1)
    before = checkpoint.read_checkpoint(training("train").train(start, tmp_path / "start")).state
    last = training("train").train(chosen, tmp_path / "w")
    moved: dict[str, float] = {}
    for name, tensor in checkpoint.read_checkpoint(last).state.items():
        part = name.partition(".")[0]
        moved[part] = max(moved.get(part, 0.0), float((tensor - before[name]).abs().max()))
    # AdamW moves a weight by about the rate in a step.
    assert moved["llm"] < 1e-7 and 1e-6 < moved["visual_encoder"] < 1e-4 and 1e-3 < moved["projector"] < 1e-2
    root = read_torch(last).root
    groups = root["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-9, 1e-5, 1e-3]
    assert [i for group in groups for i in group["params"]] == list(range(len(before)))
    assert root["param_schedulers"][-1]["base_values"] == [1e-9, 1e-5, 1e-3]
    whole = checkpoint.read_checkpoint(last).state
    last.unlink()
    again = checkpoint.read_checkpoint(training("train").train(chosen, tmp_path / "w", resume=True)).state
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    text = (tmp_path / "w" / "full_fullvit.py").read_text()
    assert "paramwise_cfg=dict(custom_keys={'llm': dict(lr_mult=1e-06), 'visual_encoder': dict(lr_mult=0.01)})" in text


WANDB = """
import json
class run:
    @staticmethod
    def log(values, step=None, **_):
        with open("logged.jsonl", "a") as file:
            print(json.dumps([step, values]), file=file)
    @staticmethod
    def finish():
        with open("logged.jsonl", "a") as file:
            print(json.dumps("finished"), file=file)
def init(project=None, **_):
    with open("logged.jsonl", "a") as file:
        print(json.dumps(project), file=file)
    return run
"""


def test_a_tracker(tiny: Path, tmp_path: Path) -> None:
    """Weights & Biases by accelerate's tracker; a package of that name stands in for the client."""
    (tmp_path / "site" / "wandb-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "wandb-1.0.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 1.0\n")
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    data = draw(tmp_path / "data")
    held_rows(data, 2)
    chosen = with_sets(recipe(tiny, data, "pretrain", trackers=("wandb",)), every=4, answers=0)
    with pytest.raises(UsageError, match=r"train\.trackers: wandb is not installed"):
        training("train").train(chosen, tmp_path / "none")
    path = f"{environment()['PYTHONPATH']}:{tmp_path / 'site'}"
    train(chosen, tmp_path / "w", more={"PYTHONPATH": path})
    name, *logged, end = [json.loads(line) for line in (tmp_path / "logged.jsonl").read_text().splitlines()]
    assert (name, end) == ("pretrain", "finished")
    assert [values["train/loss"] for _, values in logged[:4]] == losses(tmp_path / "w")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 4]
    assert logged[4][1] == {"eval/loss": evaluations(tmp_path / "w")[0]["loss"]}


def test_a_tracker_that_lacks_what_it_needs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed with --no-deps, say: told before a model is loaded, as the user's to repair."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "trackio.py").write_text("import gradio_client_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path / "site")
    chosen = recipe(tiny, draw(tmp_path / "data"), "pretrain", trackers=("trackio",))
    with pytest.raises(UsageError, match=r"trackio cannot be imported .*gradio_client") as refused:
        training("train").train(chosen, tmp_path / "w")
    assert "pip install" in str(refused.value.hint) and not (tmp_path / "w").exists()


def test_the_attention_is_chosen(tiny: Path) -> None:
    chosen = recipes.ModelRecipe(str(tiny / "llm"), str(tiny / "vit"), attention="eager")
    assert training("model").Llava(chosen).llm.config._attn_implementation == "eager"
    with pytest.raises(UsageError, match="needs flash-attn, which is not installed"):
        training("model").Llava(replace(chosen, attention="flash_attention_2"))


# --- sizes of the base models that recipes name, from their published configs

CONFIGS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "lmsys/vicuna-7b-v1.5": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "lmsys/vicuna-13b-v1.5": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
    "microsoft/Phi-3-mini-4k-instruct": Phi3Config(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
        pad_token_id=32000,
    ),
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    ),
}  # fmt: skip


def test_every_recipe_has_a_known_size() -> None:
    """But for InternLM, whose classes are code of its own: `train --list` says that the memory is unknown."""
    assert set(CONFIGS) == set(sizes.KNOWN)
    for name in recipes.recipe_names():
        (chosen, *_) = recipes.load_recipe(name)
        named = {chosen.model.llm, chosen.model.visual_encoder}
        assert chosen.build or {one for one in named if not one.startswith("internlm/")} <= set(CONFIGS)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_sizes_are_those_of_the_real_classes(name: str) -> None:
    """Counted by transformers and peft, on no memory."""
    config, shape = CONFIGS[name], sizes.KNOWN[name]
    assert sizes.Shape.of_config(config) == shape
    with init_empty_weights():
        model: Any = CLIPVisionModel(config) if "clip" in name else AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules=sorted(linear - {"lm_head"})))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == shape.lora(recipes.Lora(r=64))
