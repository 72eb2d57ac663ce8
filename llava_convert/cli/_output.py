"""The one place that prints. stdout is data, stderr is talk; progress is shown on a terminal only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_convert.cli.schemas import SCHEMA
from llava_convert.core.errors import OutputError
from llava_convert.core.text import human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

    from llava_convert.engine.report import Published
    from llava_convert.storage.remote.files import Traffic


@dataclass
class Output:
    """How this run speaks: for people, as JSON, quietly, or with every detail."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    command: str | None = None
    started: float = field(default_factory=time.monotonic)
    _progress: Progress | None = field(default=None, repr=False)
    _told: bool = field(default=False, repr=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            self._talk(text)

    def warn(self, text: str) -> None:
        self._talk(f"warning: {text}", style="yellow")

    def error(self, message: str, hint: str | None, exit_code: int) -> None:
        """An error in words, and as the object of `--json` where nothing else was printed."""
        self.stop()
        self._talk(f"error: {message}", style="bold red")
        if hint:
            self._talk(f"  → {hint}")
        self.result({"error": message, "hint": hint, "exit_code": exit_code})

    def fetched(self, traffic: Traffic) -> None:
        """What a source that lies elsewhere has cost."""
        if traffic.requests:
            self.note(f"fetched {human_bytes(traffic.bytes)} in {traffic.requests} requests")

    def published(self, every: Iterable[Published]) -> None:
        """What each hub has now."""
        for one in every:
            there = f", {one.skipped} of them were there already" if one.skipped else ""
            state = "as they are here" if one.compared else "sent"
            self.line(f"{one.url}: {one.files} files, {human_bytes(one.bytes)}, {state}{there}")

    def result(self, value: Mapping[str, Any]) -> None:
        """The run's data, when it was asked for as JSON."""
        if self.as_json and not self._told:
            self._told = True  # one document: an error after the report has its exit code and its line on stderr
            about = {"schema": SCHEMA, "command": self.command, "seconds": round(time.monotonic() - self.started, 3)}
            _print(json.dumps({**about, **value}, indent=2))  # in ASCII, which is JSON under every encoding

    def line(self, text: str) -> None:
        """A line of the result, for people."""
        if not self.as_json and not self.quiet:
            _print(text)

    def piece(self, text: str) -> None:
        """A piece of a line of the result, for people, at once."""
        if not self.as_json and not self.quiet and text:
            _print(text, end="")

    @property
    def shows_progress(self) -> bool:
        return not self.quiet and not self.as_json and sys.stderr.isatty()

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """A bar for `total` bytes with rate and time left; returns what advances it."""
        if not self.shows_progress:
            return lambda done: None
        from rich.progress import DownloadColumn, TransferSpeedColumn

        return self._bar(what, total, (DownloadColumn(), TransferSpeedColumn()))

    def count(self, what: str, total: int) -> Callable[[int], None]:
        """A bar for `total` things, with the time left."""
        if not self.shows_progress:
            return lambda done: None
        from rich.progress import MofNCompleteColumn

        self.stop()  # a bar of bytes has other columns
        return self._bar(what, total, (MofNCompleteColumn(),))

    def _bar(self, what: str, total: int, figures: tuple[Any, ...]) -> Callable[[int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.start()
        progress, task = self._progress, self._progress.add_task(what, total=total)
        return lambda done: progress.advance(task, done)

    def stop(self) -> None:
        """Take the bar away, before anything else is said."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _talk(self, text: str, style: str | None = None) -> None:
        # A closed pipe or a full disk must not hide what the command did.
        with suppress(OSError):
            if style is not None and sys.stderr.isatty():
                from rich.console import Console
                from rich.text import Text

                Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)
            else:
                print(text, file=sys.stderr)


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)  # now, so that a closed pipe or a full disk is noticed while it can be told
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise OutputError(f"the result cannot be printed: {problem.strerror or problem}") from problem
