"""Answers kept as they come, a line each, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llava_convert.core.errors import InputError, OutputError

_STEM = "answers"


class Answers:
    """The answers in a work folder, each process's in a file of its own.

    The first line of a file says what it is of. Raises OutputError (exit 6) where the folder has answers of another
    run: another model, other questions, or other options.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int) -> None:
        self._about, self._path = dict(about), folder / f"{_STEM}-{rank}.jsonl"
        self.folder = folder
        self.found = self._read()
        self._file: IO[str] | None = None

    def _read(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for path in sorted(self.folder.glob(f"{_STEM}-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            about, *rows = [row for row in map(_parsed, lines) if row is not None] or [self._about]
            if about != self._about:
                differs = sorted(k for k in about.keys() | self._about.keys() if about.get(k) != self._about.get(k))
                raise OutputError(
                    f"{self.folder} holds answers of another run: {', '.join(differs)} differ",
                    hint="give another --work-dir, or --force to begin again",
                )
            found |= {row["index"]: row["prediction"] for row in rows if "index" in row}
        return found

    def __enter__(self) -> Answers:
        new = not self._path.exists() or not self._path.stat().st_size
        self._file = self._path.open("a", encoding="utf-8")
        # A line that a kill has cut is ended, so that the next one stands alone.
        if not new and not self._path.read_bytes().endswith(b"\n"):
            self._file.write("\n")
        if new:
            self._line(self._about)
        return self

    def add(self, index: int, prediction: str) -> None:
        self.found[index] = prediction
        self._line({"index": index, "prediction": prediction})

    def _line(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def reread(self) -> None:
        """Take in what the other processes have answered."""
        self.found = self._read()


def stored(folder: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """What the answers in a folder are of, and the answers. Raises InputError where there are none."""
    paths = sorted(folder.glob(f"{_STEM}-*.jsonl"))
    rows = (
        [row for line in paths[0].read_text(encoding="utf-8").splitlines() if (row := _parsed(line))] if paths else []
    )
    if not rows:
        raise InputError(f"{folder} holds no answers", hint="give the --work-dir of `llava-convert eval mmbench`")
    return rows[0], Answers(folder, rows[0], 0).found


def forget(folder: Path) -> None:
    """Remove the answers of an earlier run."""
    for path in folder.glob(f"{_STEM}-*.jsonl"):
        path.unlink()


def _parsed(line: str) -> dict[str, Any] | None:
    """A line; None for one that a kill has cut."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
