"""Conversations made into token ids, labels and pictures, as LLaVA is trained on them.

Ids lie in one flat array, memory-mapped from a cache, so that a set of a million rows costs no memory and is tokenised
once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llava_convert.assets.processor import squared
from llava_convert.core.errors import InputError

from .conversations import (
    CUT,
    IMAGE_TOKEN,
    Conversation,
    Draws,
    Encoder,
    Listings,
    Turn,
    conversations,
    read_picture,
    require_pictures,
    require_samples,
    template_of,
)
from .disk import unwritten
from .recipe import DataRecipe, DataSet
from .rows import require_file

IGNORE_INDEX = -100
_FORMAT = 3  # of the cache: another number is another cache
_BATCH = 2000  # rows tokenised together


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


class Conversations(Dataset[Any]):
    """All sets of a recipe, one after the other.

    `lengths` are tokens of text and picture markers, negative without a picture, for the sampler; `left_out` is what
    the rows hold and nothing is learnt from, by set and reason. `seed` draws from sets that have a `max_rows`: the same
    for each epoch, process and resumed run. Raises InputError for files and rows that are wrong,
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
        seed: int = 0,
    ) -> None:
        self.encoder = Encoder(tokenizer, template_of(recipe.prompt_template), recipe.max_length - image_tokens)
        self.pictures, self.skip = pictures, recipe.on_bad_image == "skip"
        self.root = Path(recipe.root)
        self.left_out: dict[str, dict[str, int]] = {}
        self.index: list[tuple[_Encoded, int, Path]] = []
        draws = Draws(seed)
        listings = Listings()
        for one in sets or recipe.sets:
            file, folder = self.root / one.file, self.root / one.images
            found = _encoded(file, one.format, self.encoder, cache)
            taken = draws.taken(one, found.places, found.total)
            require_samples(len(taken), file)
            missing = [name for name in found.named() if listings.missing_from(folder, name)]
            require_pictures(file, folder, missing, len(missing) == len(found.named()), skip=self.skip)
            found.keep()
            self.left_out[one.name] = found.left_out
            self.index += [(found, i, folder) for i in taken]

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


@dataclass(frozen=True)
class _Encoded:
    """One file: sample i is `ids[offsets[i]:offsets[i + 1]]`, of row `rows[i]`, about `images[i]`.

    It is number `places[i]`, from 0, of the `total` conversations of the file, of which some were left out.

    An image is None for text; the empty name is one that the sample does not see. `folder` is where the cache keeps it.
    """

    path: Path
    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: list[int]
    images: list[str | None]
    left_out: dict[str, int]
    places: list[int]
    total: int
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
            text = json.dumps([self.rows, self.images, self.left_out, self.places, self.total])
            (self.folder / "rows.json").write_text(text, encoding="utf-8")  # last: it is the mark
        except OSError as problem:  # NumPy's has no number, and its own words
            raise unwritten(problem, self.folder) from None


def _encoded(path: Path, form: str, encoder: Encoder, cache: Path | None) -> _Encoded:
    """A file's samples, from the cache where it has been read before with the same tokenizer and template."""
    folder = None if cache is None else cache / _digest(path, form, encoder)
    if folder is None or not (folder / "rows.json").is_file():
        return _encode(path, form, encoder, folder)
    ids, learnt, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "learnt", "offsets"))
    rows, images, left_out, places, total = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return _Encoded(path, ids, learnt, offsets, rows, images, left_out, places, total, folder)


def _digest(path: Path, form: str, encoder: Encoder) -> str:
    require_file(path)
    stat = path.stat()
    # A probe tells tokenizers apart better than their names do.
    probe = encoder([[Turn(f"{IMAGE_TOKEN}\nWhat is it? 是什么", "Two cats, 2024.")]])
    state = [
        _FORMAT,
        form,
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        repr(encoder.template),
        encoder.max_length,
        repr(probe),
    ]
    state.append(len(encoder.tokenizer))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]


def _encode(path: Path, form: str, encoder: Encoder, folder: Path | None) -> _Encoded:
    ids: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_]] = []
    rows: list[int] = []
    images: list[str | None] = []
    left_out: Counter[str] = Counter()
    places: list[int] = []
    total = 0
    batch: list[tuple[int, Conversation]] = []

    def flush() -> None:
        for (at, one), (tokens, learn) in zip(batch, encoder([one.turns for _, one in batch]), strict=True):
            if any(learn):
                places.append(at)
                ids.append(np.array(tokens, np.int32))
                learnt.append(np.array(learn))
                rows.append(one.row.number)
                images.append(one.row.image if one.sees else None if one.row.image is None else "")
            else:
                left_out[CUT] += 1
                left_out.subtract(one.left_out)
        batch.clear()

    for total, one in enumerate(conversations(path, encoder.template, form), 1):
        left_out.update(one.left_out)
        if one.turns:
            batch.append((total - 1, one))
        if len(batch) == _BATCH:
            flush()
    flush()
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    taught = np.concatenate(learnt) if ids else np.zeros(0, bool)
    return _Encoded(path, flat, taught, offsets, rows, images, dict(+left_out), places, total, folder)


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
