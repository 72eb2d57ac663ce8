"""Rows of data sets: conversations in a json list, or one a line (jsonl), read as a stream.

A row is `{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}]}`; chat
data of other programs say `messages`, `role` and `content`, `user` and `assistant`, and give pictures as a list
(`images`). Of a list one row at a time is in memory. json's own scanner does the work: streaming parsers (ijson) do not
say where in a file an error is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llava_convert.core.errors import InputError

from .formats import FORMATS, NotThis
from .recipe import DATA_CHECK

_PIECE = 1 << 20  # characters read at once
_LONGEST = 16 * _PIECE  # of a row: a file that is no list of rows is not read to its end for one
_BLANK = re.compile(r"[ \t\r\n]*")
# Near the end of what was read, an error may only say that a row goes on.
_NEAR = 64


@dataclass(frozen=True)
class Row:
    """A conversation as its file has it: who says what (`human`, `gpt` or `system`), about at most one picture.

    A format may make several conversations of one value, which then share its number and line.
    """

    number: int  # from 1
    line: int  # on which it begins, from 1
    image: str | None
    messages: tuple[tuple[str, str], ...]

    def at(self, path: Path) -> str:
        """The row's place, for messages."""
        return place(path, self.line, self.number)


def place(path: Path, line: int, number: int) -> str:
    """`file: line 7, row 3`; of a jsonl, whose lines are rows, `file: line 7`."""
    return f"{path}: line {line}" if path.suffix == ".jsonl" else f"{path}: line {line}, row {number}"


def require_file(path: Path) -> None:
    """Raises InputError where a data file does not exist."""
    if not path.is_file():
        raise InputError(f"{path}: no such data file", hint=f"`{DATA_CHECK}` says what is missing")


def read_rows(path: Path, form: str = "conversations") -> Iterator[Row]:
    """The rows of a json or jsonl file, in order; `form` is one of FORMATS.

    Raises InputError, with file, line and row, for a file that does not exist, is something else than data (a git-lfs
    pointer, a web page), or holds a row that is not of its format, about at most one picture.
    """
    require_file(path)
    with path.open("rb") as raw:
        stands_in = not_the_file(raw.read(512))
    if stands_in:
        raise InputError(f"{path}: {stands_in[0]}", hint=stands_in[1])
    values = _lines(path) if path.suffix == ".jsonl" else _list(path)
    for number, (line, value) in enumerate(values, 1):
        yield from rows_of(value, form, path, line, number)


def rows_of(value: Any, form: str, path: Path, line: int, number: int) -> Iterator[Row]:
    """The rows that a JSON value of a file makes. Raises InputError where it is not of the format."""
    try:
        for image, messages in FORMATS[form].read(value):
            yield Row(number, line, image, messages)
    except NotThis as problem:
        raise InputError(f"{place(path, line, number)}: {problem}") from None


def not_the_file(head: bytes) -> tuple[str, str] | None:
    """What a download left in place of a file, and how to get the file: a pointer of git-lfs, a web page.

    `head` is the file's beginning. None: neither of these.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "is a pointer of git-lfs, not the file", "in its folder: git lfs install && git lfs pull"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head)\b", head, re.IGNORECASE):
        return (
            "is a web page (HTML), not the file",
            "download it again: on huggingface.co an address with /resolve/ gives the file, one with /blob/ its page",
        )
    return None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except (ValueError, RecursionError) as problem:
                raise InputError(f"{path}: line {number}: {_words(problem)}", hint=_MENDED) from None


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        window = _Window(file)
        number = 1
        try:
            if window.next() != "[":
                hint = "a file of one row a line is called .jsonl" if window.next() == "{" else None
                raise InputError(f"{path}: line {window.line}: not a list of conversations", hint=hint)
            while True:
                window.skip()  # the bracket, or the comma
                if number == 1 and window.next() == "]":
                    break
                window.next()
                yield window.line, window.value()
                number += 1
                if (sign := window.next()) == "]":
                    break
                if sign != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", window.text, window.at)
            window.skip()
            if window.next():
                raise json.JSONDecodeError("Extra data after the list", window.text, window.at)
        except json.JSONDecodeError as problem:
            at = place(path, window.line + problem.doc.count("\n", window.at, problem.pos), number)
            raise InputError(f"{at}: {_words(problem)}", hint=_MENDED) from None
        except (ValueError, RecursionError) as problem:
            raise InputError(f"{place(path, window.line, number)}: {_words(problem)}", hint=_MENDED) from None


_MENDED = "the file may have been cut while it was downloaded: get it again, or fix the row"


def _words(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"not JSON: {problem.msg}"
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8: {problem.reason}"
    return "not JSON: nested too deeply" if isinstance(problem, RecursionError) else f"not JSON: {problem}"


class _Window:
    """The part of a file that is looked at: `text` from `at` on, which lies on `line`; read on as it is needed."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.decoder = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            match = _BLANK.match(self.text, self.at)
            assert match is not None  # of nothing, at least
            self._to(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._to(self.at + 1)

    def value(self) -> Any:
        """The JSON value that begins here. Raises JSONDecodeError."""
        while True:
            try:
                found, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as problem:
                goes_on = problem.msg.startswith("Unterminated string") or problem.pos > len(self.text) - _NEAR
                if not goes_on or len(self.text) - self.at > _LONGEST or not self._more():
                    raise
            else:
                self._to(end)
                return found

    def _to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _more(self) -> bool:
        piece = self.file.read(_PIECE)
        if piece:
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)
