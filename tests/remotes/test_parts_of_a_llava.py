"""`--llm`, `--visual-encoder` and `--base` that name a whole LLaVA on a hub: its part is read in place, alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hubs.huggingface import HuggingFace
from tests.remotes.conftest import Command


@pytest.fixture
def projector(command: Command, tiny: Path, tmp_path: Path) -> Path:
    ran = command("convert", tiny / "iter_2.pth", "--to", "official", "--part", "projector", "-o", "bridge")
    assert ran.code == 0, ran.stderr
    return tmp_path / "bridge" / "mm_projector.bin"


def sent(hub: HuggingFace, repo: str) -> int:
    """Bytes of the repository's files that were fetched."""
    return sum(seen.sent for seen in hub.requests if f"/{repo}/resolve/" in seen.path and seen.method == "GET")


def tensors(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("layout", ["hf", "official", "xtuner", "gguf"])
def test_the_part_of_a_whole_llava(
    command: Command,
    hf: HuggingFace,
    layouts: dict[str, Path],
    projector: Path,
    tiny: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    hf.add("org/whole", layouts[layout])
    llm, tower = ("--llm", "org/whole"), ("--visual-encoder", str(tiny / "vit"))
    ran = command("convert", projector, "--to", "hf", "-o", "remote", *llm, *tower)
    assert ran.code == 0, ran.stderr
    here = command("convert", projector, "--to", "hf", "-o", "local", "--llm", layouts[layout], *tower)
    assert here.code == 0, here.stderr
    remote, local = (tensors(tmp_path / out) for out in ("remote", "local"))
    assert remote and remote == local
    assert str(tmp_path) not in (tmp_path / "remote" / "conversion.json").read_text()


def test_a_tower_is_fetched_alone(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], projector: Path, tiny: Path, tmp_path: Path
) -> None:
    hf.add("org/whole", layouts["hf"])
    bases = ("--llm", str(tiny / "llm"), "--visual-encoder", "org/whole")
    ran = command("convert", projector, "--to", "official", "-o", "out", *bases)
    assert ran.code == 0, ran.stderr
    whole = sum(file.stat().st_size for file in layouts["hf"].glob("*.safetensors"))
    assert 0 < sent(hf, "org/whole") < whole / 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_vision_tower"] != "org/whole"  # of which no loader of towers can make one


def test_a_part_alone_is_read_as_before(
    command: Command, hf: HuggingFace, projector: Path, tiny: Path, tmp_path: Path
) -> None:
    hf.add("org/llm", tiny / "llm")
    ran = command("convert", projector, "--to", "hf", "-o", "out", "--llm", "org/llm", "--visual-encoder", tiny / "vit")
    assert ran.code == 0, ran.stderr
    assert "org/llm" in (tmp_path / "out" / "README.md").read_text()


def test_one_that_lacks_the_part(command: Command, hf: HuggingFace, projector: Path, tiny: Path) -> None:
    hf.add("org/bridge", projector.parent)
    bases = ("--llm", tiny / "llm", "--visual-encoder", "org/bridge")
    ran = command("convert", projector, "--to", "hf", "-o", "out", *bases)
    assert ran.code == 3 and "org/bridge is a LLaVA of the official layout that holds no whole vision" in ran.stderr
    assert "--visual-encoder" in ran.stderr
