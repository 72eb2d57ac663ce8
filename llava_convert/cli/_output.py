"""The one place that prints. stdout is data, stderr is talk; progress is shown on a terminal only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import field
from typing import TYPE_CHECKING, Any

from llava_convert.app.progress_line import Shown
from llava_convert.core.errors import OutputError
from llava_convert.core.text import human_bytes
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from llava_convert.engine.report import Published
    from llava_convert.storage.remote.files import Traffic

SCHEMA = 1  # of what `--json` prints: it goes up when a key goes, or means something else; keys may be added


@dataclass
class Output:
    """How this run speaks: for people, as JSON, quietly, or with every detail."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    command: str | None = None
    started: float = field(default_factory=time.monotonic)
    _told: bool = field(default=False, repr=False)
    _shown: Shown = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shown = Shown(self.note, shows=not self.quiet and not self.as_json)

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
        self.stop()
        if self.as_json and not self._told:
            self._told = True  # one document: an error after the report has its exit code and its line on stderr
            about = {"schema": SCHEMA, "command": self.command, "seconds": round(time.monotonic() - self.started, 3)}
            _print(json.dumps({**about, **value}, indent=2))  # in ASCII, which is JSON under every encoding

    def line(self, text: str) -> None:
        """A line of the result, for people."""
        self.stop()
        if not self.as_json and not self.quiet:
            _print(text)

    def piece(self, text: str) -> None:
        """A piece of a line of the result, for people, at once."""
        self.stop()
        if not self.as_json and not self.quiet and text:
            _print(text, end="")

    @property
    def shows_progress(self) -> bool:
        return self._shown.shows_progress

    def stage(self, what: str | None) -> None:
        """A stage begins, and nobody knows how long it takes; None where something else shows what goes on."""
        self._shown.stage(what)

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """A stage of `total` bytes begins; returns what advances it."""
        return self._shown.start(what, total)

    def count(self, what: str, total: int) -> Callable[[int], None]:
        """A stage of `total` things begins; returns what advances it."""
        return self._shown.count(what, total)

    def file(self, name: str) -> None:
        """The file that is worked on now."""
        self._shown.file(name)

    def stop(self) -> None:
        """Take the line of progress away, before anything else is said."""
        self._shown.stop()

    def finish(self) -> None:
        """The last line of a job that took its time, or that was watched: how long, and how fast."""
        self._shown.finish()

    def _talk(self, text: str, style: str | None = None) -> None:
        # A closed pipe or a full disk must not hide what the command did.
        with suppress(OSError):
            if self._shown.console is not None or (style is not None and sys.stderr.isatty()):
                from rich.console import Console
                from rich.text import Text

                # soft_wrap: a command in a message can be copied, since no line break is put into it.
                console = self._shown.console or Console(stderr=True, highlight=False)
                console.print(Text(text, style=style or ""), soft_wrap=True)
            else:
                print(text, file=sys.stderr)


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)  # now, so that a closed pipe or a full disk is noticed while it can be told
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise OutputError(f"the result cannot be printed: {problem.strerror or problem}") from problem
