"""Conversations that are not trained on, while training goes on: their loss, and answers to a few of them.

No dropout, and no random number that the run would use: it goes on as if nothing had been evaluated.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llava_convert.core.errors import InputError

from .conversations import IMAGE_INDEX
from .data import IGNORE_INDEX, Conversations, collate
from .disk import unwritten
from .logs import whole_rows
from .recipe import EvalRecipe

FILE = "eval.jsonl"


@dataclass(frozen=True)
class Answer:
    """What the model says to a question beside what the data say."""

    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, how often, and where it is written: a line each in `eval.jsonl`."""

    recipe: EvalRecipe
    data: Conversations
    tokenizer: Any
    batch_size: int

    def due(self, iteration: int, last: int) -> bool:
        """Whether it is done after an iteration, counted from 1; always after the last one."""
        return iteration % self.recipe.every == 0 or iteration == last

    def run(self, accelerator: Accelerator, wrapped: Any) -> tuple[float, list[Answer]]:
        """The loss over all held-out answers, and sample answers; every process calls this and gets the same."""
        wrapped.eval()
        try:
            with torch.no_grad():
                loss = held_out_loss(accelerator, wrapped, self.data, self.batch_size)
                count = min(self.recipe.answers, len(self.data))
                said = [answer(accelerator, wrapped, self.sample(i), self.tokenizer, self.recipe) for i in range(count)]
        finally:
            wrapped.train()
        return loss, said

    def sample(self, i: int) -> dict[str, torch.Tensor]:
        return loaded([self.data[i]])

    def write(self, folder: Path, iteration: int, loss: float, answers: Sequence[Answer]) -> None:
        """Add a line to `eval.jsonl`, and tell it. Raises OutputError on a full disk."""
        row = {"iter": iteration, "loss": loss, "answers": [vars(one) for one in answers]}
        try:
            with (folder / FILE).open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as problem:
            raise unwritten(problem, folder / FILE) from None
        lines = [f"held out after {iteration}: loss {loss:.4f} over {len(self.data)} conversations"]
        lines += [f"  {one.question!r} → {one.answer!r} (expected {one.expected!r})" for one in answers]
        print("\n".join(lines), file=sys.stderr, flush=True)


def forget_later(folder: Path, iteration: int) -> None:
    """Take out of `eval.jsonl` what comes after an iteration, which a run that is taken up again writes anew."""
    path = folder / FILE
    if path.is_file():
        rows = [row for row in whole_rows(path) if row["iter"] <= iteration]
        path.write_text("".join(_line(row) for row in rows), encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def held_out_loss(accelerator: Accelerator, wrapped: Any, data: Conversations, batch_size: int) -> float:
    """The mean over all answers' tokens. Every process takes its share, in as many batches as the others."""
    world, rank = accelerator.num_processes, accelerator.process_index
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(math.ceil(len(data) / batch_size / world)):
        first = (step * world + rank) * batch_size
        mine = range(first, min(first + batch_size, len(data)))
        batch = loaded([data[i] for i in mine or [0]])
        tokens = int((batch["labels"] != IGNORE_INDEX).sum()) if mine else 0  # what fills up counts for nothing
        loss = wrapped(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        total += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
    summed = accelerator.reduce(total.float().to(accelerator.device), "sum")
    return float(summed[0] / summed[1])


def answer(
    accelerator: Accelerator, wrapped: Any, sample: dict[str, torch.Tensor], tokenizer: Any, recipe: EvalRecipe
) -> Answer:
    """The likeliest answer to a sample's first question, token by token, up to what ends answers in training."""
    ids, labels = sample["input_ids"][0], sample["labels"][0]
    learnt = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    start = learnt[0]
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORE_INDEX), len(labels))
    stops = {int(ids[end - 1]), tokenizer.eos_token_id}
    found: list[int] = []
    pixels = sample["pixel_values"].to(accelerator.device)
    for _ in range(recipe.max_tokens):
        tokens = torch.tensor([[*ids[:start].tolist(), *found]], device=accelerator.device)
        logits = wrapped(
            input_ids=tokens, labels=None, attention_mask=torch.ones_like(tokens, dtype=torch.bool), pixel_values=pixels
        )
        found.append(int(logits[0].argmax()))
        if found[-1] in stops:
            break

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([t for t in tokens if t != IMAGE_INDEX], skip_special_tokens=True)).strip()

    return Answer(text(ids[:start].tolist()), text(ids[start:end].tolist()), text(found))


def loaded(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Samples as a batch. Raises InputError for a picture that cannot be read."""
    batch = collate(samples)
    if isinstance(batch, InputError):
        raise batch
    return batch
