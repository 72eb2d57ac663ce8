"""Progress in a real notebook: one widget, or plain lines without ipywidgets, and no codes of a terminal in either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT
from tests.interop.peer_programs import in_peer

CELL = """
import sys
sys.path.insert(0, {checkout!r})
import llava_convert
llava_convert.convert({source!r}, to="hf", out={out!r}, progress=True)
"""


def shown(tiny: Path, folder: Path, *, widgets: bool) -> list[dict[str, Any]]:
    cell = CELL.format(checkout=str(CHECKOUT), source=str(tiny / "iter_2.pth"), out=str(folder / "out"))
    (outputs,) = in_peer("notebook", "run_notebook.py", {"cells": [cell], "widgets": widgets}, folder)
    assert (folder / "out" / "model.safetensors").is_file()
    assert "\\u001b" not in str(outputs) and "\x1b" not in str(outputs)
    return list(outputs)


@pytest.mark.peers
def test_a_widget_shows_the_line(tiny: Path, tmp_path: Path) -> None:
    outputs = shown(tiny, tmp_path, widgets=True)
    widgets = [one for one in outputs if "application/vnd.jupyter.widget-view+json" in one.get("data", {})]
    assert len(widgets) == 1  # which changes, rather than one for each stage
    assert any(one.get("text", "").startswith("took 0:") for one in outputs)


@pytest.mark.peers
def test_without_widgets_there_are_lines(tiny: Path, tmp_path: Path) -> None:
    *lines, result = shown(tiny, tmp_path, widgets=False)
    assert [one["output_type"] for one in lines] == ["stream"] * len(lines)
    assert "merged LoRA into 18 modules" in "".join(one["text"] for one in lines)
    assert result["data"]["text/plain"].startswith("Report(pth → hf, done")
