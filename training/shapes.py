"""tiny-shapes: pictures that the project draws, questions about them, and base models to start from.

A picture shows one to four equal shapes of one colour in one quarter. Some combinations of colour, shape, number and
place are never trained on: those are the held-out pictures, so that a right answer is not one learnt by heart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .tiny import write_json, write_language_model, write_tower

SIDE, CELL = 56, 14  # pixels; a quarter has four cells, and a cell is one patch of the tower
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
    "yellow": (240, 200, 30), "purple": (150, 50, 180), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("cross", "square", "triangle")
NUMBERS = ("one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {
    "colour": "What colour is it?",
    "shape": "Which shape is it?",
    "number": "How many are there?",
    "place": "Where is it?",
}
HELD_OUT_EVERY = 6


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    colour: str
    shape: str
    number: str
    place: str

    def answer(self, kind: str) -> str:
        return str(getattr(self, kind))

    @property
    def caption(self) -> str:
        return f"{self.number} {self.colour} {self.shape}{'s' * (self.number != 'one')} at the {self.place}"


def scenes() -> tuple[list[Scene], list[Scene]]:
    """Every combination, in two parts: to train on, and held out."""
    every = [Scene(*words) for words in product(COLOURS, SHAPES, NUMBERS, PLACES)]
    random.Random(5).shuffle(every)
    return [s for i, s in enumerate(every) if i % HELD_OUT_EVERY], every[::HELD_OUT_EVERY]


def draw(scene: Scene, chance: random.Random) -> Image.Image:
    """The scene as 56 x 56 pixels; where in its quarter things lie, how large and how bright is chance."""
    grey = chance.randint(0, 90)
    picture = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    pen = ImageDraw.Draw(picture)
    left, top = "right" in scene.place, "bottom" in scene.place
    for cell in chance.sample(range(4), NUMBERS.index(scene.number) + 1):
        size = chance.randint(10, 13)
        x = left * 2 * CELL + cell % 2 * CELL + chance.randint(0, CELL - size)
        y = top * 2 * CELL + cell // 2 * CELL + chance.randint(0, CELL - size)
        colour = tuple(max(0, min(255, value + chance.randint(-15, 15))) for value in COLOURS[scene.colour])
        box = (x, y, x + size, y + size)
        if scene.shape == "cross":
            third = size // 3
            pen.rectangle((x + third, y, x + size - third, y + size), fill=colour)
            pen.rectangle((x, y + third, x + size, y + size - third), fill=colour)
        elif scene.shape == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x + size / 2, y), (x, y + size), (x + size, y + size)], fill=colour)
    return picture


def conversations(every: list[Scene], pictures: int, chance: random.Random) -> Iterator[tuple[Scene, list[str]]]:
    """So many scenes, each with all kinds of questions in an order of its own."""
    for number in range(pictures):
        kinds = list(QUESTIONS)
        chance.shuffle(kinds)
        yield every[number % len(every)], kinds


def build(folder: Path, *, seed: int, pictures: int = 2400) -> None:
    """Write base models, pictures and questions into `folder`, unless they are there; the same bytes for a seed.

    `pretrain.json` has a caption a picture, `finetune.json` the questions, `held_out.json` those kept apart: a list of
    {"image", "kind", "question", "answer"}.
    """
    mark = folder / "held_out.json"
    if mark.is_file():
        return
    known, kept = scenes()
    chance = random.Random(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for number, (scene, kinds) in enumerate(conversations(known, pictures, chance)):
        name = f"{number:05d}.png"
        draw(scene, chance).save(images / name)
        captions.append(_row(name, [("What is in this picture?", scene.caption)]))
        questions.append(_row(name, [(QUESTIONS[kind], scene.answer(kind)) for kind in kinds]))
    held = []
    for number, scene in enumerate(kept):
        name = f"held_out_{number:03d}.png"
        draw(scene, chance).save(images / name)
        held += [
            {"image": name, "kind": kind, "question": QUESTIONS[kind], "answer": scene.answer(kind)}
            for kind in QUESTIONS
        ]
    corpus = [" ".join(turn["value"] for turn in row["conversations"]) for row in captions]
    corpus += [f"{question} {scene.answer(kind)}" for scene in known for kind, question in QUESTIONS.items()]
    write_language_model(
        folder / "llm", [*corpus, "system user assistant\n\n"], tokens=512, seed=seed,
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    write_tower(
        folder / "vit", seed=seed + 1,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIDE, patch_size=CELL,
    )  # fmt: skip
    write_json(folder / "pretrain.json", captions)
    write_json(folder / "finetune.json", questions)
    mark.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def _row(image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said: list[dict[str, str]] = []
    for asked, answer in turns:
        said += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": Path(image).stem, "image": image, "conversations": said}
