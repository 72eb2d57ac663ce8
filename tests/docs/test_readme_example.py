"""What README.md shows first is what the commands print."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_convert.cli import app

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_block_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "fixtures" / "tiny", tmp_path / "fixtures" / "tiny")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    shown = [part.splitlines() for part in block[1].strip().split("$ llava-convert ")[1:]]
    assert [lines[0].split()[0] for lines in shown] == ["pth", "verify"]
    for command, *lines in shown:
        ran = CliRunner().invoke(app, shlex.split(command))
        assert ran.exit_code == 0, ran.output
        # The page says of these notes below the block.
        printed = [line for line in ran.output.splitlines() if not line.startswith("the hub id of the ")]
        assert sorted(printed) == sorted(filter(None, lines))
