"""Conversations made into token ids, labels and pictures, as LLaVA is trained on them.

What is made of a row (rows.py) follows xtuner 0.1.23 (llava_map_fn, template_map_fn, and `encode_fn` of
dataset/utils.py) token for token. Ids lie in one flat array, memory-mapped from a cache, so that a set of a million
rows costs no memory and is tokenised once. `data check` and training read conversations by the same functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from llava_convert.assets.prompts import PromptTemplate, prompt_template
from llava_convert.core.errors import InputError

from .disk import unwritten
from .recipe import DATA_CHECK, PLAIN_TEMPLATE, DataRecipe, DataSet
from .rows import Row, not_the_file, read_rows, require_file

IMAGE_TOKEN, IMAGE_INDEX, IGNORE_INDEX = "<image>", -200, -100
# LLaVA's pretraining (llava/train/train.py, preprocess_plain): the picture, the caption and a line break; what the
# human asks is left out.
PLAIN = PromptTemplate(name=PLAIN_TEMPLATE, user="{input}", suffix="\n", suffix_is_eos=True)
_FORMAT = 2  # of the cache: another number is another cache
_BATCH = 2000  # rows tokenised together
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

    `image` is what orders samples by modality, as in xtuner; `sees` is whether an `<image>` asks for it.
    """

    row: Row
    turns: list[Turn]
    sees: bool
    left_out: tuple[str, ...]


def template_of(name: str) -> PromptTemplate:
    """xtuner's template of that name, or LLaVA's plain one."""
    return PLAIN if name == PLAIN.name else prompt_template(name)


def conversations(path: Path, template: PromptTemplate) -> Iterator[Conversation]:
    """The rows of a file as turns.

    Raises InputError naming the row that does not fit: more `<image>` than pictures, a system message that the template
    has no place for.
    """
    for row in read_rows(path):
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


@dataclass(frozen=True)
class Pictures:
    """How a file becomes what the tower sees: (3, size, size) float32."""

    processor: Any
    pad: bool
    size: int

    def load(self, path: Path) -> torch.Tensor:
        """Raises OSError or ValueError where the file is missing or not a picture."""
        picture = read_picture(path)
        if self.pad:
            picture = squared(picture, tuple(int(x * 255) for x in self.processor.image_mean))
        pixels: torch.Tensor = self.processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def blank(self) -> torch.Tensor:
        """What a text-only sample sends through the tower, so that every process runs the same graph."""
        return torch.zeros(3, self.size, self.size)


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


def squared(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of that colour."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new(picture.mode, (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


class Conversations(Dataset[Any]):
    """All sets of a recipe, one after the other.

    `lengths` are tokens of text and picture markers, negative without a picture, for the sampler; `left_out` is what
    the rows hold and nothing is learnt from, by set and reason. Raises InputError for files and rows that are wrong,
    for pictures that do not exist, and for a set of which nothing is left.
    """

    def __init__(
        self,
        recipe: DataRecipe,
        tokenizer: Any,
        pictures: Pictures,
        *,
        image_tokens: int,
        cache: Path | None = None,
        sets: Sequence[DataSet] = (),
    ) -> None:
        self.encoder = Encoder(tokenizer, template_of(recipe.prompt_template), recipe.max_length - image_tokens)
        self.pictures, self.skip = pictures, recipe.on_bad_image == "skip"
        self.root = Path(recipe.root)
        self.left_out: dict[str, dict[str, int]] = {}
        self.index: list[tuple[_Encoded, int, Path]] = []
        listings = Listings()
        for one in sets or recipe.sets:
            file, folder = self.root / one.file, self.root / one.images
            found = _encoded(file, self.encoder, cache)
            require_samples(len(found.rows), file)
            require_pictures(file, folder, listings.missing(folder, found.named()), len(found.named()), self.skip)
            found.keep()
            self.left_out[one.name] = found.left_out
            self.index += [(found, i, folder) for i in range(len(found.images))] * one.repeats

    @property
    def lengths(self) -> list[int]:
        return [s.length(i) for s, i, _ in self.index]

    def hold_out(self, count: int) -> Conversations:
        """Take `count` samples, spread evenly, out of these; returns them as a set of their own.

        Raises InputError where no more than one would be left of two.
        """
        if len(self.index) < 2 * count:
            raise InputError(
                f"{len(self.index)} conversations are too few to hold {count} of them out",
                hint="--set eval.rows=… takes fewer; [[eval.set]] names data of its own",
            )
        step = len(self.index) // count
        held: Conversations = object.__new__(Conversations)
        held.__dict__.update(self.__dict__)
        held.index = self.index[::step][:count]
        self.index = [one for i, one in enumerate(self.index) if i % step or i // step >= count]
        return held

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor] | InputError:
        """A sample; or what is wrong with its picture, as a value: exceptions lose their form between processes."""
        for step in range(len(self.index)):
            encoded, i, folder = self.index[(at + step) % len(self.index)]
            ids, learnt = encoded.sample(i)
            image = encoded.images[i]
            sample = {"ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(learnt, ids, IGNORE_INDEX))}
            if not image:
                return {**sample, "pixel_values": self.pictures.blank()}
            try:
                return {**sample, "pixel_values": self.pictures.load(folder / image)}
            except (OSError, ValueError) as problem:
                said = f"{encoded.path}: row {encoded.rows[i]}: picture {folder / image}: {problem}"
                if not self.skip:
                    return InputError(said, hint='data.on_bad_image="skip" takes the next row instead')
                print(f"skipped: {said}", file=sys.stderr, flush=True)
        return InputError("none of the pictures can be read")


def left_out_words(left_out: Mapping[str, int]) -> list[str]:
    """A line for each reason, rows before parts of rows."""
    order = sorted(left_out, key=lambda reason: (reason not in DROPPED, reason))
    return [f"left out: {left_out[reason]:,} {reason}" for reason in order if left_out[reason]]


def require_samples(count: int, file: Path) -> None:
    """Raises InputError for a set that nothing can be learnt from."""
    if not count:
        raise InputError(f"{file}: no conversation with an answer to learn", hint=f"`{DATA_CHECK}` counts what it has")


def require_pictures(file: Path, folder: Path, missing: Mapping[str, str], named: int, skip: bool) -> None:
    """Raises InputError where pictures are missing; where rows may be skipped, only where all are.

    `missing` has the name of each picture that does not exist in `folder`, once.
    """
    if not missing or (skip and len(missing) < named):
        return
    which = "none of its pictures is" if len(missing) == named else f"{len(missing):,} of its pictures are not"
    raise InputError(
        f"{file}: {which} in {folder}, for instance {next(iter(missing))}",
        hint=f"set data.root, and data.set.images relative to it; `{DATA_CHECK}` lists them and says how to get them",
    )


class Listings:
    """Which files exist, asked a folder at a time: asking for a million files one by one takes long on network disks.

    A link counts as what it leads to.
    """

    def __init__(self) -> None:
        self.folders: dict[str, frozenset[str]] = {}

    def missing(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """Of the pictures named in a folder those that do not exist, each with the folder that it should be in."""
        found = {}
        for name in dict.fromkeys(names):
            where, _, last = str(folder / name).rpartition("/")
            if last not in self.files(where or "/"):
                found[name] = where
        return found

    def files(self, folder: str) -> frozenset[str]:
        """Names of the files in a folder; none where it does not exist."""
        if folder not in self.folders:
            try:
                with os.scandir(folder) as entries:
                    self.folders[folder] = frozenset(e.name for e in entries if e.is_file())
            except (OSError, ValueError):  # ValueError: a name that no file can have
                self.folders[folder] = frozenset()
        return self.folders[folder]


@dataclass(frozen=True)
class _Encoded:
    """One file: sample i is `ids[offsets[i]:offsets[i + 1]]`, of row `rows[i]`, about `images[i]`.

    An image is None for text; the empty name is one that the sample does not see. `folder` is where the cache keeps it.
    """

    path: Path
    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: list[int]
    images: list[str | None]
    left_out: dict[str, int]
    folder: Path | None = None

    def sample(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.ids[span].astype(np.int64), np.array(self.learnt[span])

    def length(self, i: int) -> int:
        length = int(self.offsets[i + 1] - self.offsets[i])
        return length if self.images[i] is not None else -length

    def named(self) -> list[str]:
        """The pictures that samples see, each once."""
        return list(dict.fromkeys(image for image in self.images if image))

    def keep(self) -> None:
        """Write it to the cache, unless it is there. Raises OutputError on a full disk."""
        if self.folder is None or (self.folder / "rows.json").is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("ids", "learnt", "offsets"):
                np.save(self.folder / f"{name}.npy", getattr(self, name))
            text = json.dumps([self.rows, self.images, self.left_out])
            (self.folder / "rows.json").write_text(text, encoding="utf-8")  # last: it is the mark
        except OSError as problem:  # NumPy's has no number, and its own words
            raise unwritten(problem, self.folder) from None


def _encoded(path: Path, encoder: Encoder, cache: Path | None) -> _Encoded:
    """A file's samples, from the cache where it has been read before with the same tokenizer and template."""
    folder = None if cache is None else cache / _digest(path, encoder)
    if folder is None or not (folder / "rows.json").is_file():
        return _encode(path, encoder, folder)
    ids, learnt, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "learnt", "offsets"))
    rows, images, left_out = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return _Encoded(path, ids, learnt, offsets, rows, images, left_out, folder)


def _digest(path: Path, encoder: Encoder) -> str:
    require_file(path)
    stat = path.stat()
    # A probe tells tokenizers apart better than their names do.
    probe = encoder([[Turn(f"{IMAGE_TOKEN}\nWhat is it? 是什么", "Two cats, 2024.")]])
    state = [
        _FORMAT,
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        repr(encoder.template),
        encoder.max_length,
        repr(probe),
    ]
    state.append(len(encoder.tokenizer))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]


def _encode(path: Path, encoder: Encoder, folder: Path | None) -> _Encoded:
    ids: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_]] = []
    rows: list[int] = []
    images: list[str | None] = []
    left_out: Counter[str] = Counter()
    batch: list[Conversation] = []

    def flush() -> None:
        for one, (tokens, learn) in zip(batch, encoder([one.turns for one in batch]), strict=True):
            if any(learn):
                ids.append(np.array(tokens, np.int32))
                learnt.append(np.array(learn))
                rows.append(one.row.number)
                images.append(one.row.image if one.sees else None if one.row.image is None else "")
            else:
                left_out[CUT] += 1
                left_out.subtract(one.left_out)
        batch.clear()

    for one in conversations(path, encoder.template):
        left_out.update(one.left_out)
        if one.turns:
            batch.append(one)
        if len(batch) == _BATCH:
            flush()
    flush()
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    taught = np.concatenate(learnt) if ids else np.zeros(0, bool)
    return _Encoded(path, flat, taught, offsets, rows, images, dict(+left_out), folder)


def collate(samples: Sequence[Any]) -> dict[str, torch.Tensor] | InputError:
    """A batch: ids and labels padded on the right, the mask of what is no padding, pictures stacked."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [s["ids"] for s in samples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=0),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad([torch.ones(len(i), dtype=torch.bool) for i in ids], batch_first=True),
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
    }
