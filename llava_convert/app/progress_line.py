"""Progress for people: one line on a terminal or in a notebook, now and then a line in a log."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING

from llava_convert.core.progress import Silence
from llava_convert.core.text import human_bytes
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_WINDOW = 20.0  # seconds that the rate is the mean of
_BAR = 20  # columns
_SPIN = "|/-\\"
LOG_EVERY = 30.0  # seconds between two lines of a log; a job that ends sooner writes none


@dataclass
class Stage:
    """A step of a job, and how far it is. `total` is None where that is not known."""

    what: str
    total: int | None = None
    in_bytes: bool = True
    began: float = 0.0
    done: int = 0
    file: str = ""
    _seen: deque[tuple[float, int]] = field(default_factory=deque, repr=False)

    def rate(self, now: float) -> float:
        """What is done in a second, of late; 0 where nothing was."""
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        then, before = self._seen[0] if len(self._seen) > 1 else (self.began, 0)
        return (self.done - before) / (now - then) if now > then else 0.0

    def text(self, width: int, now: float, *, bar: str = "━") -> str:
        """One line of at most `width` columns: what there is no room for is left out.

        `bar` is the character of the bar, in ASCII or not; there is none without.
        """
        gone = clock(now - self.began)
        if self.total is None:
            spin = _SPIN[int(now * 8) % len(_SPIN)]
            return _fitting([(0, self.what), (1, spin), (2, gone), (3, self.file)], width)
        rate = self.rate(now)
        part = min(1.0, self.done / self.total) if self.total else 1.0
        speed = f"{human_bytes(round(rate))}/s" if self.in_bytes else f"{rate:.1f}/s"
        left = f"eta {clock((self.total - self.done) / rate)}" if rate and self.done < self.total else ""
        full = round(part * _BAR)
        bars = bar * full + ("." if bar == "#" else "·") * (_BAR - full) if bar else ""
        figures = (
            f"{human_bytes(self.done)}/{human_bytes(self.total)}" if self.in_bytes else f"{self.done}/{self.total}"
        )
        return _fitting(
            [
                (0, self.what),
                (5, self.file),
                (6, bars),
                (0, f"{part:4.0%}"),
                (4, figures),
                (1, speed if rate else ""),
                (3, gone),
                (2, left),
            ],
            width,
        )

    def ended(self, now: float) -> str:
        """What it did, once it has ended: with time and rate."""
        seconds = now - self.began
        if not self.in_bytes:
            return f"{self.what} {self.done} in {clock(seconds)}"
        rate = f" ({human_bytes(round(self.done / seconds))}/s)" if seconds else ""
        return f"{self.what} {human_bytes(self.done)} in {clock(seconds)}{rate}"


def _fitting(pieces: list[tuple[int, str]], width: int) -> str:
    """The pieces in one line: the lowest numbers are taken first, then whatever still fits."""
    taken: set[int] = set()
    room = width + 2  # each piece but the first has two spaces before it
    for at in sorted(range(len(pieces)), key=lambda i: pieces[i][0]):
        rank, text = pieces[at]
        if text and (rank == 0 or len(text) + 2 <= room):
            taken.add(at)
            room -= len(text) + 2
    return "  ".join(text for at, (_, text) in enumerate(pieces) if at in taken)[:width]


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Shown(Silence):
    """A reporter that shows the stage that runs, and prints notes and warnings, all on stderr.

    A terminal and a notebook have one line that changes, elsewhere `log` gets one every `LOG_EVERY` seconds.
    """

    def __init__(self, log: Callable[[str], None] | None = None, *, shows: bool = True) -> None:
        self._log = log or (lambda text: print(text, file=sys.stderr))
        self.shows_progress = shows and _can_show()
        self._live: Live | None = None
        self._stage: Stage | None = None
        self._lock = threading.Lock()
        self._began = self._logged = time.monotonic()
        self.ended: list[str] = []

    def note(self, text: str) -> None:
        self._log(text)

    def warn(self, text: str) -> None:
        self._log(f"warning: {text}")

    @property
    def console(self) -> Console | None:
        """The console of the line, while there is one."""
        return self._live.console if self._live is not None else None

    def stage(self, what: str | None) -> None:
        """A stage begins of which nobody knows how long it takes; None where something else shows what goes on."""
        if what is None:
            self.stop()
        else:
            self._begin(Stage(what, began=time.monotonic()))

    def start(self, what: str, total: int) -> Callable[[int], None]:
        return self._begin(Stage(what, total, began=time.monotonic()))

    def count(self, what: str, total: int) -> Callable[[int], None]:
        return self._begin(Stage(what, total, in_bytes=False, began=time.monotonic()))

    def file(self, name: str) -> None:
        """The file that is worked on now."""
        if self._stage is not None:
            self._stage.file = name

    def stop(self) -> None:
        """Take the line away, before anything else is printed."""
        self._end()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self) -> None:
        """The last line of a job that took its time, or that was watched: how long, and how fast."""
        self.stop()
        seconds = time.monotonic() - self._began
        if self.ended and (self.shows_progress or seconds > LOG_EVERY):
            self._log(f"took {clock(seconds)}: {', '.join(self.ended)}")

    def _begin(self, stage: Stage) -> Callable[[int], None]:
        self._end()
        self._stage = stage
        if self.shows_progress and self._live is None:
            from rich.live import Live

            self._live = Live(
                console=_console(),
                get_renderable=self._line,
                transient=True,
                refresh_per_second=8,
                redirect_stdout=False,
            )
            self._live.start(refresh=True)

        def advance(step: int) -> None:
            with self._lock:
                stage.done += step
                if not self.shows_progress and time.monotonic() - self._logged > LOG_EVERY:
                    self._logged = time.monotonic()
                    self._log(stage.text(120, self._logged, bar=""))

        return advance

    def _end(self) -> None:
        if self._stage is not None and self._stage.total is not None and self._stage.done:
            self.ended.append(self._stage.ended(time.monotonic()))
        self._stage = None

    def _line(self) -> Text:
        from rich.text import Text

        console = self.console
        if self._stage is None or console is None:
            return Text("")
        bar = "#" if console.options.ascii_only else "━"
        line = Text(self._stage.text(console.width - 1, time.monotonic(), bar=bar), no_wrap=True, overflow="crop")
        line.highlight_regex(r"━+", "cyan")
        line.highlight_regex(r"·+|eta [\d:]+", "dim")
        line.highlight_words([self._stage.what], "bold")
        return line


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _can_show() -> bool:
    """Whether a line can be changed once it is printed: not in a log, nor in a notebook without ipywidgets."""
    if sys.stderr.isatty():
        return not _console().is_dumb_terminal
    notebook = "ipykernel" in sys.modules and _console().is_jupyter
    return notebook and importlib.util.find_spec("ipywidgets") is not None
