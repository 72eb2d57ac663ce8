"""The line that a conversion prints last is followed as it is printed, by who stands where it was printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from llava_convert.layouts.info import TARGETS
from tests.interop.printed_commands import served, words

PROGRAM = [sys.executable, "-m", "llava_convert"]
# With a blank and a quote, which a shell and Python read otherwise.
OUT = "my llava's"
OUTPUTS = [
    (to, part)
    for to, target in TARGETS.items()
    # Of the source the tower alone has an adapter.
    for part in (
        ("visual-encoder",)
        if target.adapters_alone
        else ("all", "llm", "visual-encoder", *(("projector",) if target.projector is not None else ()))
    )
]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def printed(arguments: list[str], folder: Path) -> str:
    """The next step that a conversion prints."""
    done = run([*PROGRAM, "convert", *arguments, "-o", OUT], folder)
    assert done.returncode == 0, done.stderr
    *_, last = done.stderr.splitlines()
    where, _, line = last.partition(": ")
    assert where == ("next, in Python" if line.startswith("from ") else "next")
    return line


def follow(line: str, folder: Path) -> str:
    """Do what a line says; returns which kind of line it was."""
    if line.startswith("from transformers import "):
        done = run([sys.executable, "-c", line], folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr
        return "python"
    if line.startswith("llama-server "):
        with served(line, folder) as address:
            assert json.load(urllib.request.urlopen(f"{address}/health"))["status"] == "ok"
        return "llama-server"
    program, *arguments = words(line)
    assert program == "llava-convert"
    done = run([*PROGRAM, *arguments], folder)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr
    return arguments[0]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "part"), OUTPUTS)
def test_the_next_step_works(tiny: Path, tmp_path: Path, to: str, part: str) -> None:
    more = ["--dtype", "float16"] if (to, part) == ("pth", "all") else []  # which it is not already
    line = printed([str(tiny / "iter_2.pth"), "--to", to, "--part", part, *more], tmp_path)
    kinds = {"hf": "python", "gguf": "llama-server"}
    wanted = kinds.get(to, "verify") if part == "all" else "verify"
    if part == "llm":
        wanted = {"gguf": "llama-server", "pth": "verify"}.get(to, "python")
    assert follow(line, tmp_path) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("part", ["all", "llm"])
def test_ollama_is_named_where_it_was_asked_for(tiny: Path, tmp_path: Path, part: str) -> None:
    line = printed([str(tiny / "iter_2.pth"), "--to", "Ollama", "--part", part], tmp_path)
    create, _, start = line.partition(" && ")
    *command, name, flag, modelfile = words(create)
    assert (command, flag) == (["ollama", "create"], "-f") and words(start) == ["ollama", "run", name]
    assert (tmp_path / modelfile).read_text().startswith("FROM ")


@pytest.mark.slow
def test_it_names_the_base_models_that_were_given(tiny: Path, tmp_path: Path) -> None:
    """Without them the checkpoint, moved away from where it was trained, cannot be read again."""
    shutil.copy(tiny / "iter_2.pth", tmp_path)
    for part in ("llm", "vit"):
        shutil.copytree(tiny / part, tmp_path / f"a {part}")
    bases = ["--visual-encoder", "a vit", "--lora-alpha", "visual-encoder=8"]
    line = printed(["iter_2.pth", "--to", "official", "--llm", "a llm", *bases], tmp_path)
    assert words(line)[4:] == ["--llm", "a llm", *bases[:3], "visual-encoder=8.0"]
    assert follow(line, tmp_path) == "verify"


@pytest.mark.slow
def test_an_adapter_alone_is_compared(golden: Path, tmp_path: Path) -> None:
    """transformers would load the base model that is not there."""
    source = golden / "cases" / "b_llmlora_vitlora" / "pth" / "iter_2.pth"
    line = printed([str(source), "--to", "xtuner", "--part", "llm"], tmp_path)
    assert follow(line, tmp_path) == "verify"
