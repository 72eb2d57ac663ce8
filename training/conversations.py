"""Conversations of a data set as they are trained on: turns, pictures, and what is left out and why.

What is made of a row (rows.py) follows xtuner 0.1.23 (llava_map_fn, template_map_fn, and `encode_fn` of
dataset/utils.py) token for token. `data check`, dry run and training read conversations by these functions; torch is
not needed for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_convert.assets.prompts import PromptTemplate, prompt_template
from llava_convert.core.errors import InputError

from .recipe import DATA_CHECK, PLAIN_TEMPLATE, DataSet
from .rows import Row, not_the_file, read_rows

IMAGE_TOKEN, IMAGE_INDEX = "<image>", -200
# LLaVA's pretraining (llava/train/train.py, preprocess_plain): the picture, the caption and a line break; what the
# human asks is left out.
PLAIN = PromptTemplate(name=PLAIN_TEMPLATE, user="{input}", suffix="\n", suffix_is_eos=True)
_NO_BOS = ("QWenTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")

# What is left out of a set, and of rows of it; the words of every report.
NO_ANSWER = "rows without an answer"
CUT = "rows whose answer lies beyond max_length"
EARLY_ANSWER = "answers before the first question"
LATE_QUESTION = "questions without an answer"
UNSEEN = "pictures that no <image> asks for"
DROPPED = (NO_ANSWER, CUT)  # these are whole rows


@dataclass(frozen=True)
class Turn:
    """A question as it is encoded, `<image>` still a word, and its answer."""

    asked: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A row as it is trained on: its turns (none: there is nothing to learn), and what was left out of it.

    The row's picture orders samples by modality, as in xtuner; `sees` is whether an `<image>` asks for it.
    """

    row: Row
    turns: list[Turn]
    sees: bool
    left_out: tuple[str, ...]


def template_of(name: str) -> PromptTemplate:
    """xtuner's template of that name, or LLaVA's plain one."""
    return PLAIN if name == PLAIN.name else prompt_template(name)


def conversations(path: Path, template: PromptTemplate, form: str = "conversations") -> Iterator[Conversation]:
    """The rows of a file of a format (FORMATS) as turns.

    Raises InputError naming the row that does not fit: more `<image>` than pictures, a system message that the template
    has no place for.
    """
    for row in read_rows(path, form):
        turns, left_out = turns_of(row, template, path)
        marks = sum(turn.asked.count(IMAGE_TOKEN) for turn in turns)
        pictures = int(row.image is not None)
        if marks > pictures:
            raise InputError(f"{row.at(path)}: {marks} {IMAGE_TOKEN} in its questions, {pictures} pictures")
        if turns and pictures and not marks:
            left_out = (*left_out, UNSEEN)
        yield Conversation(row, turns, bool(marks), left_out)


def turns_of(row: Row, template: PromptTemplate, path: Path) -> tuple[list[Turn], tuple[str, ...]]:
    """Questions with their answers, and what was left out. `<image>` goes to the front of its message, on its line.

    In the plain template a question is the picture alone. What a human says twice in a row is one question. A system
    message stands before the first question, as the template has it. Raises InputError where it cannot.
    """
    found: list[Turn] = []
    left_out: list[str] = []
    system = asked = ""
    open_question = False
    for role, said in row.messages:
        if role == "system":
            if not said:
                continue
            if template.system is None or found or asked or system:
                why = "has no place for one" if template.system is None else "has a place before the first question"
                raise InputError(
                    f"{row.at(path)}: a system message, and the prompt template {template.name} {why}",
                    hint="take it out of the row, or choose another data.prompt_template",
                )
            system = template.system.replace("{system}", said)
        elif role == "gpt":
            if open_question or found:
                user = template.user.replace("{round}", str(len(found) + 1)).replace("{input}", asked)
                found.append(Turn(("" if found else system) + user + template.assistant, said))
            else:
                left_out.append(EARLY_ANSWER)
            asked, open_question = "", False
        else:
            open_question = True
            if template is PLAIN:
                said = IMAGE_TOKEN if IMAGE_TOKEN in said else ""
            elif IMAGE_TOKEN in said:
                said = f"{IMAGE_TOKEN}\n{said.replace(IMAGE_TOKEN, '').strip()}".strip()
            asked += said
    learns = any(turn.answer or template.suffix or not template.suffix_is_eos for turn in found)
    if not learns:
        return [], (NO_ANSWER,)
    return found, (*left_out, *((LATE_QUESTION,) if open_question else ()))


class Draws:
    """Conversations drawn from sets that have more than `max_rows`, set by set.

    As xtuner draws them (process_hf_dataset) in a run of this seed: by NumPy's legacy generator, from all of a file,
    before what nothing is learnt from is left out; anew for each repeat.
    """

    def __init__(self, seed: int) -> None:
        self.generator = np.random.RandomState(seed)

    def taken(self, one: DataSet, places: Sequence[int], total: int) -> list[int]:
        """Which of the samples are taken, in order; sample i is number `places[i]` of the file's `total`."""
        if not one.max_rows:
            return [*range(len(places))] * one.repeats
        sample_of = {place: i for i, place in enumerate(places)}
        count = min(one.max_rows, total)
        drawn = [self.generator.choice(total, count, replace=False).tolist() for _ in range(one.repeats)]
        return [sample_of[place] for each in drawn for place in each if place in sample_of]


@dataclass(frozen=True)
class Encoder:
    """Turns into ids and labels: the loss is on answers and on what ends them."""

    tokenizer: Any
    template: PromptTemplate
    max_length: int

    def __call__(self, rows: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of each row, and which of them are learnt; cut after `max_length`."""
        texts = [
            t
            for turns in rows
            for turn in turns
            for t in (*turn.asked.split(IMAGE_TOKEN), turn.answer + self.template.suffix)
        ]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        return [self._joined(turns, encoded) for turns in rows]

    def _joined(self, turns: Sequence[Turn], encoded: Iterator[list[int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learnt: list[bool] = []

        def add(more: Sequence[int], *, learn: bool) -> None:
            ids.extend(more)
            learnt.extend([learn] * len(more))

        ends = not self.template.suffix_is_eos
        starts = True
        for turn in turns:
            if starts:
                add(self.bos, learn=False)
            for piece in range(turn.asked.count(IMAGE_TOKEN) + 1):
                add([IMAGE_INDEX] if piece else [], learn=False)
                add(next(encoded), learn=False)
            add(next(encoded), learn=True)
            if ends:
                add(self.eos, learn=True)
            starts = ends
            add(self.sep, learn=False)
        return ids[: self.max_length], learnt[: self.max_length]

    @property
    def bos(self) -> list[int]:
        if type(self.tokenizer).__name__ in _NO_BOS or self.tokenizer.bos_token_id is None:
            return []
        return [self.tokenizer.bos_token_id]

    @property
    def eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id]

    @property
    def sep(self) -> list[int]:
        return list(self.tokenizer.encode(self.template.sep, add_special_tokens=False)) if self.template.sep else []


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB, decoded to its last line. Raises OSError or ValueError where it cannot be."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except Image.DecompressionBombError as problem:
        raise ValueError(str(problem)) from None
    except (OSError, ValueError, SyntaxError) as problem:  # SyntaxError: what Pillow says of a broken PNG
        with path.open("rb") as file:
            stands_in = not_the_file(file.read(512))
        raise ValueError(stands_in[0] if stands_in else str(problem)) from None


def left_out_words(left_out: Mapping[str, int]) -> list[str]:
    """A line for each reason, rows before parts of rows."""
    order = sorted(left_out, key=lambda reason: (reason not in DROPPED, reason))
    return [f"left out: {left_out[reason]:,} {reason}" for reason in order if left_out[reason]]


def require_samples(count: int, file: Path) -> None:
    """Raises InputError for a set that nothing can be learnt from."""
    if not count:
        raise InputError(f"{file}: no conversation with an answer to learn", hint=f"`{DATA_CHECK}` counts what it has")


def require_pictures(file: Path, folder: Path, missing: Sequence[str], every: bool, *, skip: bool) -> None:
    """Raises InputError where pictures are missing; where rows may be skipped, only where `every` picture is.

    `missing` has the name of each picture that does not exist in `folder`, once.
    """
    if not missing or (skip and not every):
        return
    which = "none of its pictures is" if every else f"{len(missing):,} of its pictures are not"
    raise InputError(
        f"{file}: {which} in {folder}, for instance {missing[0]}",
        hint=f"set data.root, and data.set.images relative to it; `{DATA_CHECK}` lists them and says how to get them",
    )


class Listings:
    """Which files exist, asked a folder at a time: asking for a million files one by one takes long on network disks.

    A link counts as what it leads to.
    """

    def __init__(self) -> None:
        self.folders: dict[str, frozenset[str]] = {}

    def missing_from(self, folder: Path, name: str) -> str | None:
        """The folder that a picture named in `folder` should be in, where it is not; None where it is."""
        where, _, last = str(folder / name).rpartition("/")
        return None if last in self.files(where or "/") else where

    def files(self, folder: str) -> frozenset[str]:
        """Names of the files in a folder; none where it does not exist."""
        if folder not in self.folders:
            try:
                with os.scandir(folder) as entries:
                    self.folders[folder] = frozenset(e.name for e in entries if e.is_file())
            except (OSError, ValueError):  # ValueError: a name that no file can have
                self.folders[folder] = frozenset()
        return self.folders[folder]
