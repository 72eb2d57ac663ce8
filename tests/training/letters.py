"""A third stage for tiny-shapes, asked as MMBench asks and answering by a letter; and a TSV of held-out questions."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_convert.core.resources import training
from tests.mmbench_files import COPIES, write_tsv

shapes = training("shapes")
CLOSING = "Answer with the option's letter from the given choices directly."  # of xtuner 0.1.23 (tools/mmbench.py)
OPTIONS = {
    "colour": tuple(shapes.COLOURS)[:4],
    "shape": shapes.SHAPES,
    "number": shapes.NUMBERS,
    "place": shapes.PLACES,
}
ABILITIES = {"colour": "attribute_reasoning", "shape": "coarse_perception", "number": "logic_reasoning"}
NAME = "tiny-shapes-letters"
QUESTIONS = 84  # of the 192, which seven forms and xtuner are asked one by one
RECIPE = """\
[model]
llm = "work_dirs/tiny-shapes/base/llm"
visual_encoder = "work_dirs/tiny-shapes/base/vit"
gradient_checkpointing = false
freeze_llm = false
visual_encoder_lora = {{ r = 16, alpha = 32, dropout = 0.0 }}
pretrained = "{before}"

[data]
root = "work_dirs/tiny-shapes/base"
prompt_template = "llama3_chat"
max_length = 320
workers = 0
set = [{{ name = "letters", file = "letters.json", images = "images" }}]

[train]
dtype = "fp32"
batch_size = 32
seed = 1024
lr = 1e-3
max_iters = {iterations}
save_steps = 5000
keep = 1

[eval]
every = 100000
answers = {questions}
max_tokens = 4
set = [{{ name = "held out", file = "letters_held_out.json", images = "images" }}]
"""


def asked(text: str, options: tuple[str, ...]) -> str:
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=False))
    return f"{text}\n{listed}{CLOSING}"


def questions(base: Path) -> Iterator[dict[str, Any]]:
    """The rows of the TSV: held-out questions, every fourth one with its circular copies, which name its picture."""
    index = 0
    for row in json.loads((base / "held_out.json").read_text())[:QUESTIONS]:
        options = OPTIONS[row["kind"]]
        if row["answer"] not in options:
            continue
        picture = base64.b64encode((base / "images" / row["image"]).read_bytes()).decode()
        for turn in range(len(options) if index % 4 == 0 else 1):
            turned = options[turn:] + options[:turn]
            cells = dict(zip("ABCD", (*turned, "", ""), strict=False))
            yield {
                "index": index + turn * COPIES, "question": row["question"], "hint": "", **cells,
                "answer": "ABCD"[turned.index(row["answer"])], "category": row["kind"],
                "l2-category": ABILITIES.get(row["kind"], "relation_reasoning"),
                "image": picture if turn == 0 else str(index), "file": row["image"],
            }  # fmt: skip
        index += 1


def prepare(folder: Path, *, before: str, iterations: int) -> tuple[Path, Path]:
    """Write data and recipe into a finished run of tiny-shapes; the recipe and the TSV."""
    base, chance = folder / "work_dirs" / "tiny-shapes" / "base", random.Random(7)
    rows = []
    for row in json.loads((base / "finetune.json").read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        kinds = {text: kind for kind, text in shapes.QUESTIONS.items()}
        for text, answer in zip(turns[::2], turns[1::2], strict=True):
            if answer in (options := OPTIONS[kinds[text]]):
                rows.append(_row(row["image"], asked(text, options), "ABCD"[options.index(answer)]))
    chance.shuffle(rows)
    held = list(questions(base))
    letters = ("A", "B", "C", "D")
    told = [_row(q["file"], asked(q["question"], tuple(q[x] for x in letters if q[x])), str(q["answer"])) for q in held]
    (base / "letters.json").write_text(json.dumps(rows[: iterations * 32]))
    (base / "letters_held_out.json").write_text(json.dumps(told))
    recipe = folder / f"{NAME}.toml"
    recipe.write_text(RECIPE.format(before=before, iterations=iterations, questions=len(told)))
    return recipe, write_tsv(folder / "held_out.tsv", held)


def _row(image: str, question: str, answer: str) -> dict[str, Any]:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": said}
