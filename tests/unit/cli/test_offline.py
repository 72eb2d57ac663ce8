"""Offline by default: a job on local files asks for no name and no connection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llava_convert

ROOT = Path(llava_convert.__file__).resolve().parents[1]
# An audit hook cannot be taken away again, so a process of its own; `socket.connect` and the rest are CPython's events.
GUARDED = """
import sys
asked = []
sys.addaudithook(lambda event, args: asked.append((event, args[1:])) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") else None)
from typer.testing import CliRunner
from llava_convert.cli import app
for command in sys.argv[1].split(";"):
    found = CliRunner().invoke(app, command.split())
    assert found.exit_code == 0, (command, found.output)
if len(sys.argv) > 2:
    CliRunner().invoke(app, sys.argv[2].split())
print(asked)
"""
JOBS = (
    "inspect {tiny}/iter_2.pth;convert {tiny}/iter_2.pth --to hf -o hf;verify {tiny}/iter_2.pth hf;"
    "doctor hf --for vllm;hf hf --to gguf -o gguf;layouts;train --list"
)


def asked(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", GUARDED, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}  # offline mode is not set
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_local_files_need_no_network(tiny: Path, tmp_path: Path) -> None:
    assert asked(tmp_path, JOBS.format(tiny=tiny)) == "[]"


@pytest.mark.slow
def test_a_hub_that_is_named_is_asked(tmp_path: Path) -> None:
    """So that the test above cannot pass by hearing nothing."""
    assert "getaddrinfo" in asked(tmp_path, "layouts", "inspect hf://org/model")
