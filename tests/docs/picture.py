"""docs/assets/terminal.svg, the picture in README.md, drawn of what commands print: `python -m tests.docs.picture`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "assets" / "terminal.svg"
COMMANDS = (
    "inspect tiny/iter_2.pth",
    "pth tiny/iter_2.pth --to vllm -o my-llava --llm-id me/llm --visual-encoder-id me/vit",
    "verify tiny/iter_2.pth my-llava",
)
_WIDTH = 100
# Fonts from another server are not loaded inside a picture, and are not to be asked for outside of one.
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.S)


def printed() -> list[tuple[str, str]]:
    """Each command, with what it prints in a folder that holds the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "fixtures" / "tiny", Path(folder) / "tiny")
        return [(command, _run(command, folder)) for command in COMMANDS]


def _run(command: str, folder: str) -> str:
    program = [sys.executable, "-m", "llava_convert", *shlex.split(command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def picture() -> str:
    """The picture, as SVG."""
    console = Console(record=True, width=_WIDTH, file=tempfile.TemporaryFile("w"), force_terminal=True)  # noqa: SIM115
    for command, text in printed():
        console.print(Text.assemble(("$ ", "bold green"), (f"llava-convert {command}", "bold")))
        shown = Text(text)
        shown.highlight_regex(r"(?m)^the same|\byes\b", "green")
        shown.highlight_regex(r"(?m)^next\b.*$", "cyan")
        console.print(shown)
    return console.export_svg(title="llava-convert", code_format=_FORMAT, unique_id="terminal") + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
