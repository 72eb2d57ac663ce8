"""The TSV files of MMBench and CCBench, read as xtuner 0.1.23 reads them (tools/mmbench.py, MMBenchDataset)."""

from __future__ import annotations

import base64
import binascii
import io
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.pictures import from_base64
from llava_convert.app.ask.prompts import IMAGE
from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image

COPIES = 1_000_000  # a circular copy has the index of its original, and a multiple of this more
_REFERENCE = 16  # characters: a shorter `image` is the index of the row that has the picture
_REQUIRED = ("index", "question", "category", "image", "A")
_HAN = re.compile("[\u4e00-\u9fff]")  # xtuner/tools/utils.py, is_cn_string
_CLOSING = "Answer with the option's letter from the given choices directly."
_CLOSING_CN = "请直接回答选项字母。"
_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """A row of the file. `options` by letter, as its cells are; `hint`, `answer` and `ability` may be missing."""

    index: int
    text: Any
    options: Mapping[str, Any]
    hint: Any
    answer: Any
    category: Any
    ability: Any

    @property
    def prompt(self) -> str:
        """What the model is asked, `<image>` included."""
        listed = "".join(f"{letter}. {option}\n" for letter, option in self.options.items())
        asked = f"{self.hint}\n" if self.hint is not None else ""
        said = f"{IMAGE}\n{asked}{self.text}\n{listed}"
        return said + (_CLOSING_CN if _HAN.search(said) else _CLOSING)


@dataclass(frozen=True)
class Benchmark:
    """A file of questions. `has_answers` is false for the TEST files, `has_abilities` for CCBench."""

    path: Path
    questions: tuple[Question, ...]
    has_answers: bool
    has_abilities: bool
    _images: Mapping[int, str] = field(repr=False)
    _rows: Mapping[int, int] = field(repr=False)

    def picture(self, question: Question) -> Image:
        """Raises InputError, with the number of the row, for a picture that cannot be decoded."""
        text = _followed(self._images, question.index)
        assert text is not None  # `read_benchmark` looked
        return from_base64(text, f"{self.path}: row {self._rows[question.index]}")


def read_benchmark(path: Path) -> Benchmark:
    """Read a file. Raises InputError, with the numbers of the rows, for what is broken; UsageError without pandas."""
    table = _table(path)
    lacking = [name for name in _REQUIRED if name not in table.columns]
    if lacking:
        raise InputError(
            f"{path}: no column {', '.join(lacking)}; it has {', '.join(map(printable, map(str, table.columns)))}",
            hint="MMBench_DEV_EN.tsv and its like have index, question, A, B, …, category and image",
        )
    rows = table.to_dict("records")
    letters = [letter for letter in string.ascii_uppercase if letter in table.columns]
    answers, abilities = "answer" in table.columns, "l2-category" in table.columns
    _refuse(path, _broken(rows, answers=answers))
    images = {int(row["index"]): str(row["image"]) for row in rows}
    numbers = {int(row["index"]): number for number, row in enumerate(rows, 2)}
    _refuse(path, _broken_pictures(images, numbers))
    questions = tuple(
        Question(
            index=int(row["index"]),
            text=row["question"],
            options={letter: row[letter] for letter in letters if not _empty(row[letter])},
            hint=None if _empty(row.get("hint")) else row["hint"],
            answer=row["answer"] if answers else None,
            category=row["category"],
            ability=row["l2-category"] if abilities else None,
        )
        for row in rows
    )
    return Benchmark(path, questions, answers, abilities, images, numbers)


def _table(path: Path) -> Any:
    """As xtuner's pandas has it, whose idea of an empty cell and of a number is part of its prompts."""
    try:
        import pandas
    except ImportError:
        raise UsageError(
            "eval needs pandas, which is not installed", hint="pip install 'llava-convert[eval]'"
        ) from None
    try:
        table = pandas.read_csv(path, sep="\t")
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as problem:
        raise InputError(
            f"{path}: not a table of tab-separated cells: {str(problem).strip()}", hint="download the TSV again"
        ) from problem
    if not len(table):
        raise InputError(f"{path}: it has no question", hint="give one of MMBench's TSV files, complete")
    return table


def _empty(cell: Any) -> bool:
    return cell is None or cell != cell  # pandas' NaN is what does not equal itself


def _broken(rows: list[dict[Any, Any]], *, answers: bool) -> Iterator[tuple[int, str]]:
    """What is wrong in which row; the header is row 1."""
    seen: dict[int, int] = {}
    for number, row in enumerate(rows, 2):
        index = row["index"]
        if _empty(index) or isinstance(index, str) or int(index) != index or index < 0:
            yield number, f"index {printable(str(index))!r} is not a number"
            continue
        if (first := seen.setdefault(int(index), number)) != number:
            yield number, f"its index {int(index)} is that of row {first}"
        wanted = ("question", "image", "category", *(("answer",) if answers else ()))
        if empty := [name for name in wanted if _empty(row[name])]:
            yield number, f"{', '.join(empty)} is empty"


def _broken_pictures(images: Mapping[int, str], numbers: Mapping[int, int]) -> Iterator[tuple[int, str]]:
    from PIL import Image, UnidentifiedImageError

    for index, image in images.items():
        text = _followed(images, index)
        if text is None:
            yield numbers[index], f"its image {printable(image)!r} leads to no row with a picture"
        elif len(image) >= _REFERENCE:
            try:
                Image.open(io.BytesIO(base64.b64decode(text))).close()
            except (binascii.Error, UnidentifiedImageError, OSError, ValueError, SyntaxError):
                yield numbers[index], "its image is no picture in base64"


def _followed(images: Mapping[int, str], index: int) -> str | None:
    """The picture of a row, or of the row that it names; None where the way leads nowhere."""
    seen: set[int] = set()
    while len(text := images[index]) < _REFERENCE:
        seen.add(index)
        if not text.isdecimal() or (index := int(text)) in seen or index not in images:
            return None
    return text


def _refuse(path: Path, found: Iterator[tuple[int, str]]) -> None:
    every = list(found)
    if every:
        more = f"; and {len(every) - _SHOWN} more rows" if len(every) > _SHOWN else ""
        said = "; ".join(f"row {number}: {what}" for number, what in every[:_SHOWN])
        raise InputError(f"{path}: {said}{more} (the header is row 1)", hint="get the file again, or fix these rows")
