"""The command that a conversion ends with is that of the program that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import llava_convert
from llava_convert.app.next_step import typed


@pytest.mark.parametrize(
    ("to", "command"),
    [
        ("ollama", "ollama create out.vl -f {out}/Out.VL-f16.Modelfile && ollama run out.vl"),
        ("vllm", "vllm serve {out} --chat-template {out}/chat_template.jinja"),
        ("gguf", "llama-server -m {out}/Out.VL-f16.gguf --mmproj {out}/Out.VL-mmproj-f16.gguf"),
    ],
)
def test_the_program_that_was_asked_for(tiny: Path, tmp_path: Path, to: str, command: str) -> None:
    out = tmp_path / "Out.VL"
    found = llava_convert.convert(tiny / "iter_2.pth", to=to, out=out, dry_run=True)
    assert found.next == command.format(out=out)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Path("hf://me/my-llava@main"), "hf://me/my-llava@main"),
        (Path("file:///a/b"), "file:///a/b"),
        (Path("a/b"), "a/b"),
        ("C:/models/a", "C:/models/a"),
    ],
)
def test_an_address_keeps_its_slashes(source: str | Path, text: str) -> None:
    """A path of it has one, and the printed command was not an address any more."""
    assert typed(source) == text
