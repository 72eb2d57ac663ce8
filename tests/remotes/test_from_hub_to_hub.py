"""Read from one hub, published on the other: no step has the model as a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.corpus import tree
from tests.hubs.conftest import Side, arrived
from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope
from tests.remotes.conftest import Command, weights_in


def sides(hf: HuggingFace, ms: ModelScope) -> list[Side]:
    return [Side("huggingface", hf, "main"), Side("modelscope", ms, "master")]


def test_a_conversion_is_pushed(
    command: Command, hf: HuggingFace, ms: ModelScope, layouts: dict[str, Path], tmp_path: Path
) -> None:
    ms.add("org/tiny", layouts["hf"])
    ran = command("convert", "ms://org/tiny", "--to", "gguf", "-o", "out", "--push", "me/tiny-gguf", "--hub", "both")
    assert ran.code == 0, ran.stderr
    assert "every byte checked" in ran.stdout
    for side in sides(hf, ms):
        arrived(side, "me/tiny-gguf", tmp_path / "out")


def test_an_output_is_compared_with_its_remote_source_before_it_is_sent(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/tiny", layouts["hf"])
    assert command("convert", "hf://org/tiny", "--to", "official", "-o", "out").code == 0
    hf.forget()
    ran = command("upload", "out", "me/tiny-hf")
    assert ran.code == 2 and "--source SOURCE" in ran.stderr and not hf.requests, ran.stderr
    ran = command("upload", "out", "me/tiny-hf", "--source", "hf://org/tiny")
    assert ran.code == 0, ran.stderr
    arrived(Side("huggingface", hf, "main"), "me/tiny-hf", tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\x00\x3c")
    hf.forget()
    ran = command("upload", "out", "me/other", "--source", "hf://org/tiny")
    assert ran.code == 7 and "me/other" not in hf.repos, ran.stderr


def test_a_release_of_a_remote_model(
    command: Command, hf: HuggingFace, ms: ModelScope, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/tiny", layouts["xtuner"])
    arguments = ["release", "hf://org/tiny", "--name", "me/tiny", "--hub", "both", "--only", "official,gguf"]
    arguments += ["--visual-encoder", "org/tiny-vit"]
    hf.add("org/tiny-vit", Path(__file__).parents[2] / "fixtures" / "tiny" / "vit")
    planned = command(*arguments, "--dry-run")
    assert planned.code == 0 and tree(tmp_path) == {} and not ms.requests, planned.stderr
    ran = command(*arguments)
    assert ran.code == 0, ran.stderr
    for side in sides(hf, ms):
        arrived(side, "me/tiny-hf", tmp_path / "tiny" / "tiny-hf")
        arrived(side, "me/tiny-gguf", tmp_path / "tiny" / "tiny-gguf")
    again = command(*arguments)
    assert again.code == 0 and "there already" in again.stderr + again.stdout, again.stderr
    same = command(*arguments[:-4], "--only", "xtuner")
    assert same.code == 2 and "--cache fetches it" in same.stderr, same.stderr


def test_what_was_read_from_a_hub_is_in_the_card(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(layouts["hf"], source)
    hf.add("org/tiny", source)
    assert command("convert", "hf://org/tiny", "--to", "gguf", "-o", "out", "--outtype", "q8_0").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- org/tiny\n" in card and "base_model_relation: quantized" in card, card


@pytest.mark.parametrize(("hub", "to"), [("huggingface", "gguf"), ("modelscope", "gguf"), ("modelscope", "hf")])
def test_the_cards_way_to_get_the_files(
    command: Command, hf: HuggingFace, ms: ModelScope, tiny: Path, tmp_path: Path, hub: str, to: str
) -> None:
    """The download of a pushed output's card, run as it is printed; the other commands are for what it leaves."""
    bases = ["--llm", str(tiny / "llm"), "--visual-encoder", str(tiny / "vit")]
    arguments = ["pth", tiny / "iter_2.pth", "--to", to, "-o", "out", *bases]
    ran = command(*arguments, "--push", "me/tiny-model", "--hub", hub)
    assert ran.code == 0, ran.stderr
    (side,) = [side for side in sides(hf, ms) if side.name == hub]
    card = side.files("me/tiny-model")["README.md"].decode()
    (line,) = [line for line in card.splitlines() if " download me/tiny-model" in line and "jinja" not in line]
    assert line.startswith({"huggingface": "hf ", "modelscope": "modelscope "}[hub])
    assert card.count("me/tiny-model") == 1, "all other commands name the folder"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | hf.env | ms.env | {"PATH": path}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    got = {name: data for name, data in weights_in(tmp_path / "tiny-model").items() if not name.startswith(".")}
    assert got == weights_in(tmp_path / "out")
