"""The line of progress: what it says at which width, on a terminal and in a log."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llava_convert.app import progress_line
from llava_convert.app.progress_line import Shown, Stage, clock

ROOT = Path(__file__).resolve().parents[3]


def half() -> Stage:
    stage = Stage("converting", 16_000_000_000, began=100.0, file="model-00002-of-00004.safetensors")
    stage.rate(100.0)
    stage.done = 8_000_000_000
    return stage


def test_all_is_said_where_there_is_room() -> None:
    bar = "━" * 10 + "·" * 10
    assert half().text(140, 120.0) == (
        f"converting  model-00002-of-00004.safetensors  {bar}   50%  8.0 GB/16.0 GB  400.0 MB/s  0:20  eta 0:20"
    )


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (100, "converting  model-00002-of-00004.safetensors   50%  8.0 GB/16.0 GB  400.0 MB/s  0:20  eta 0:20"),
        (90, "converting  ━━━━━━━━━━··········   50%  8.0 GB/16.0 GB  400.0 MB/s  0:20  eta 0:20"),
        (79, "converting   50%  8.0 GB/16.0 GB  400.0 MB/s  0:20  eta 0:20"),
        (48, "converting   50%  400.0 MB/s  0:20  eta 0:20"),
        (40, "converting   50%  400.0 MB/s  eta 0:20"),
        (20, "converting   50%"),
    ],
)
def test_a_narrow_terminal_has_one_line(width: int, text: str) -> None:
    assert len(text) <= width
    assert half().text(width, 120.0) == text


def test_things_are_counted_without_bytes() -> None:
    stage = Stage("answering", 200, in_bytes=False, began=0.0)
    stage.rate(0.0)
    stage.done = 50
    assert stage.text(60, 10.0).endswith("25%  50/200  5.0/s  0:10  eta 0:30")
    assert stage.ended(10.0) == "answering 50 in 0:10"


def test_a_stage_without_a_total_turns() -> None:
    stage = Stage("opening", began=0.0)
    assert {stage.text(40, 1 + i / 8) for i in range(4)} == {f"opening  {c}  0:01" for c in "|/-\\"}


def test_the_rate_is_that_of_late() -> None:
    stage = Stage("converting", 10**9, began=0.0)
    for second in range(100):
        stage.done += 1000 if second < 50 else 10
        rate = stage.rate(float(second))
    assert rate == pytest.approx(10)


def test_nothing_to_do_is_all_done() -> None:
    assert "100%" in Stage("converting", 0, began=0.0).text(80, 1.0)


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (750, "12:30"), (3723, "1:02:03"), (59.6, "1:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    said: list[str] = []
    shown = Shown(said.append)
    advance = shown.start("converting", 1000)
    for second in range(1, 101):
        now[0] = float(second)
        advance(10)
    shown.stop()
    assert len(said) == 3  # after 31, 62 and 93 seconds
    assert said[0].startswith("converting   31%  310 B/1.0 kB  10 B/s  0:31  eta 1:09")
    assert shown.ended == ["converting 1.0 kB in 1:40 (10 B/s)"]


def on_a_terminal(tmp_path: Path, **environment: str) -> str:
    """What a conversion shows on a terminal."""
    master, slave = pty.openpty()
    given = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    given |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "llava_convert", "pth", str(ROOT / "fixtures/tiny/iter_2.pth"), "--to", "hf"]
    done = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=slave, env=given, cwd=ROOT
    )
    os.close(slave)
    said = b""
    while True:
        try:
            said += (part := os.read(master, 65536))
        except OSError:  # Linux says so where the other side is closed
            break
        if not part:
            break
    os.close(master)
    assert done.wait() == 0, said
    return said.decode()


def test_a_terminal_has_stages_and_a_last_line(tmp_path: Path) -> None:
    said = on_a_terminal(tmp_path, COLUMNS="40", NO_COLOR="1")
    assert "opening" in said and "converting" in said
    assert "\x1b[3" not in said  # no colours
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("took 0:") and "converting 398.4 kB in 0:0" in last and last.endswith("/s)")
