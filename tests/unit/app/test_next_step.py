"""The command that a conversion ends with is that of the program that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import llava_convert


@pytest.mark.parametrize(
    ("to", "command"),
    [
        ("ollama", "ollama create out.vl -f {out}/Out.VL-f16.Modelfile && ollama run out.vl"),
        ("gguf", "llama-server -m {out}/Out.VL-f16.gguf --mmproj {out}/Out.VL-mmproj-f16.gguf"),
    ],
)
def test_the_program_that_was_asked_for(tiny: Path, tmp_path: Path, to: str, command: str) -> None:
    out = tmp_path / "Out.VL"
    found = llava_convert.convert(tiny / "iter_2.pth", to=to, out=out, dry_run=True)
    assert found.next == command.format(out=out)
