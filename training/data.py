"""Conversations as LLaVA's data sets hold them, made into token ids, labels and pictures.

A row is `{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}]}`, in a
json list or one a line (jsonl). What is made of it follows xtuner 0.1.23 (llava_map_fn, and `encode_fn` of
dataset/utils.py) token for token. Ids lie in one flat array, memory-mapped from a cache, so that a set of a million
rows costs no memory and is tokenised once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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

from .recipe import DATA_CHECK, DataRecipe, DataSet

IMAGE_TOKEN, IMAGE_INDEX, IGNORE_INDEX = "<image>", -200, -100
# LLaVA's pretraining (llava/train/train.py, preprocess_plain): the picture, the caption and a line break; what the
# human asks is left out.
PLAIN = PromptTemplate(name="plain", user="{input}", suffix="\n", suffix_is_eos=True)
_BATCH = 2000  # rows tokenised together
_NO_BOS = ("QWenTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclass(frozen=True)
class Turn:
    """A question as it is encoded, `<image>` still a word, and its answer."""

    asked: str
    answer: str


def require_file(path: Path) -> None:
    """Raises InputError where a data file is not there."""
    if not path.is_file():
        raise InputError(f"{path}: no such data file", hint=f"`{DATA_CHECK}` says what is missing")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a json or jsonl file, each with its number from 1. Raises InputError naming the row that is none."""
    require_file(path)
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, _row(json.loads(line), path, number)
        else:
            found = json.loads(path.read_bytes())
            if not isinstance(found, list):
                raise InputError(f"{path}: not a list of conversations")
            for number, row in enumerate(found, 1):
                yield number, _row(row, path, number)
    except ValueError as problem:
        raise InputError(f"{path}: not JSON: {problem}") from None


def _row(row: Any, path: Path, number: int) -> dict[str, Any]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    sound = isinstance(turns, list) and all(
        isinstance(t, dict) and t.get("from") in ("human", "gpt", "system") and isinstance(t.get("value"), str)
        for t in turns
    )
    image = row.get("image") if sound else None
    if not sound or not (image is None or isinstance(image, str)):
        raise InputError(f"{path}: row {number}: not a conversation of human and gpt about at most one picture")
    return dict(row)


def turns_of(row: Mapping[str, Any], template: PromptTemplate) -> list[Turn]:
    """Questions with their answers. `<image>` goes to the front of its message, on a line of its own.

    In the plain template a question is the picture alone. What a human says twice in a row is one question; answers
    before the first question are left out.
    """
    found: list[Turn] = []
    asked = ""
    seen = False
    for message in row["conversations"]:
        said = message["value"]
        if message["from"] == "gpt":
            if seen:
                user = template.user.replace("{round}", str(len(found) + 1)).replace("{input}", asked)
                found.append(Turn(user + template.assistant, said))
            asked = ""
        elif message["from"] == "human":
            seen = True
            if template is PLAIN:
                said = IMAGE_TOKEN if IMAGE_TOKEN in said else ""
            elif IMAGE_TOKEN in said:
                said = f"{IMAGE_TOKEN}\n{said.replace(IMAGE_TOKEN, '').strip()}".strip()
            asked += said
    return found


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
        """Raises OSError or ValueError where the file is missing or no picture."""
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        if self.pad:
            picture = squared(picture, tuple(int(x * 255) for x in self.processor.image_mean))
        pixels: torch.Tensor = self.processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def blank(self) -> torch.Tensor:
        """What a text-only sample sends through the tower, so that every process runs the same graph."""
        return torch.zeros(3, self.size, self.size)


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

    `lengths` are tokens of text and picture markers, negative without a picture, for the sampler. Raises InputError for
    files and rows that are wrong, for a folder of pictures where none of those asked for is, and where nothing is left.
    """

    def __init__(
        self, recipe: DataRecipe, tokenizer: Any, pictures: Pictures, *, image_tokens: int, cache: Path | None = None
    ) -> None:
        template = PLAIN if recipe.prompt_template == PLAIN.name else prompt_template(recipe.prompt_template)
        self.encoder = Encoder(tokenizer, template, recipe.max_length - image_tokens)
        self.pictures, self.skip = pictures, recipe.on_bad_image == "skip"
        self.root = Path(recipe.root)
        self.sets: list[_Encoded] = []
        for one in recipe.sets:
            found = _encoded(self.root / one.file, self.encoder, cache)
            _check_pictures(one, self.root, found)
            self.sets += [found] * one.repeats
        folders = [self.root / one.images for one in recipe.sets for _ in range(one.repeats)]
        self.index = [
            (s, i, folder) for s, folder in zip(self.sets, folders, strict=True) for i in range(len(s.images))
        ]
        if not self.index:
            raise InputError(f"{', '.join(one.file for one in recipe.sets)}: no conversation with an answer to learn")
        self.lengths = [s.length(i) for s, i, _ in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor] | InputError:
        """A sample; or what is wrong with its picture, as a value: exceptions lose their form between processes."""
        for step in range(len(self.index)):
            encoded, i, folder = self.index[(at + step) % len(self.index)]
            ids, learnt = encoded.sample(i)
            image = encoded.images[i]
            sample = {"ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(learnt, ids, IGNORE_INDEX))}
            if image is None:
                return {**sample, "pixel_values": self.pictures.blank()}
            try:
                return {**sample, "pixel_values": self.pictures.load(folder / image)}
            except (OSError, ValueError, Image.DecompressionBombError) as problem:
                said = f"{encoded.path}: row {encoded.rows[i]}: picture {folder / image}: {problem}"
                if not self.skip:
                    return InputError(said, hint='data.on_bad_image="skip" takes the next row instead')
                print(f"skipped: {said}", flush=True)
        return InputError("none of the pictures can be read")


@dataclass(frozen=True)
class _Encoded:
    """One file: sample i is `ids[offsets[i]:offsets[i + 1]]`, of row `rows[i]`, about `images[i]`."""

    path: Path
    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: list[int]
    images: list[str | None]

    def sample(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.ids[span].astype(np.int64), np.array(self.learnt[span])

    def length(self, i: int) -> int:
        length = int(self.offsets[i + 1] - self.offsets[i])
        return length if self.images[i] is not None else -length


def _encoded(path: Path, encoder: Encoder, cache: Path | None) -> _Encoded:
    """A file's samples, from the cache where it has been read before with the same tokenizer and template."""
    folder = None if cache is None else cache / _digest(path, encoder)
    if folder is None or not (folder / "rows.json").is_file():
        made = _encode(path, encoder)
        if folder is None:
            return made
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("ids", "learnt", "offsets"):
            np.save(folder / f"{name}.npy", getattr(made, name))
        (folder / "rows.json").write_text(
            json.dumps([made.rows, made.images]), encoding="utf-8"
        )  # last: it is the mark
    ids, learnt, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "learnt", "offsets"))
    rows, images = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return _Encoded(path, ids, learnt, offsets, rows, images)


def _digest(path: Path, encoder: Encoder) -> str:
    require_file(path)
    stat = path.stat()
    # A probe tells tokenizers apart better than their names do.
    probe = encoder([[Turn(f"{IMAGE_TOKEN}\nWhat is it? 是什么", "Two cats, 2024.")]])
    state = [
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        repr(encoder.template),
        encoder.max_length,
        repr(probe),
    ]
    state.append(len(encoder.tokenizer))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]


def _encode(path: Path, encoder: Encoder) -> _Encoded:
    ids: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_]] = []
    rows: list[int] = []
    images: list[str | None] = []
    batch: list[tuple[int, str | None, list[Turn]]] = []

    def flush() -> None:
        for (number, image, _), (tokens, learn) in zip(batch, encoder([turns for *_, turns in batch]), strict=True):
            if any(learn):
                ids.append(np.array(tokens, np.int32))
                learnt.append(np.array(learn))
                rows.append(number)
                images.append(image)
        batch.clear()

    for number, row in read_rows(path):
        turns = turns_of(row, encoder.template)
        marks = sum(turn.asked.count(IMAGE_TOKEN) for turn in turns)
        pictures = int(row.get("image") is not None)
        if marks > pictures:
            raise InputError(f"{path}: row {number}: {marks} <image> in the text, {pictures} pictures")
        batch.append((number, row.get("image"), turns))
        if len(batch) == _BATCH:
            flush()
    flush()
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return _Encoded(path, flat, np.concatenate(learnt) if ids else np.zeros(0, bool), offsets, rows, images)


def _check_pictures(one: DataSet, root: Path, found: _Encoded) -> None:
    """Whether the folder is the right one: of a few pictures spread over the file, not all may be missing."""
    named = [image for image in found.images if image is not None]
    probe = named[:: max(1, len(named) // 8)][:8]
    if probe and not any((root / one.images / image).is_file() for image in probe):
        raise InputError(
            f"{found.path}: none of its pictures is in {root / one.images}, for instance {probe[0]}",
            hint=f"set data.root, and data.set.images relative to it; `{DATA_CHECK}` shows the tree",
        )


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
