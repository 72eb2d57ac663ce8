"""docs/inspect-forty.md is what `inspect` says; and each command that it says to type next is typed here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_convert.cli import app
from llava_convert.model.tables.kinds import kinds
from tests.docs.forty import PAGE, THINGS, TINY, build, inside, inspected, page

# What the capitals of a command stand for, below the folder of all things.
FILLED = {
    "CHECKPOINT": "stage-1",
    "CHECKPOINT.pth": str(TINY / "iter_2.pth"),
    "LLAVA": "official",
    "MODEL": "hf",
    "PATH": str(TINY / "llm"),
    "RECIPE": "tiny-shapes",
}
# Those of other programs, which are not here, and those that ask a hub.
NOT_RUN = ("zero_to_fp32.py", "google/siglip", "openai/clip")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("forty").resolve()
    return root, build(root)


def test_the_page_is_in_step() -> None:
    assert len(THINGS) >= 40
    assert PAGE.read_text(encoding="utf-8") == page(), "`make docs` writes it"


def next_of(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


def folder_of(command: str, root: Path) -> str:
    """What FOLDER stands for: a model's own, a base, or where an archive goes."""
    if "--config-from" in command:
        return "hf"
    return str(TINY / ("llm" if "--llm" in command else "vit") if "convert" in command else root / "unpacked")


def words_of(command: str, root: Path) -> list[str]:
    """A command with what its capitals stand for, and its output under a name of its own."""
    words = []
    for word in shlex.split(command):
        if word == "FOLDER":
            word = folder_of(command, root)
        word = FILLED.get(word, word)
        words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    return words


@pytest.mark.parametrize("title", THINGS)
def test_what_it_says_to_type_next_is_done(things: tuple[Path, dict[str, Path]], title: str, tmp_path: Path) -> None:
    """The commands, followed, end within four at a conversion that is done, or at the list of what is read."""
    root, paths = things
    with inside(root):
        command = next_of(inspected(paths[title].relative_to(root)))
        seen: set[str] = set()
        for _ in range(4):
            assert command not in seen, f"a circle: {command}"
            seen.add(command)
            if any(word in command for word in NOT_RUN):
                return
            words = words_of(command, tmp_path)
            if words[0] == "python":
                done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stderr
                return
            assert words[0] == "llava-convert"
            more = ["-o", str(tmp_path / "out")] if words[1] == "convert" else []
            found = CliRunner().invoke(app, [*words[1:], *more])
            assert found.exit_code == 0, f"{command}: {found.output}"
            if words[1] != "inspect":
                return
            command = next_of(found.output)
        raise AssertionError(f"no end after {seen}")


def test_what_is_unpacked_is_a_model(things: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, paths = things
    for title, folder in (("A zip of a model", "."), ("A tar of a model", "hf")):
        command = next_of(inspected(paths[title])).replace("FOLDER", str(tmp_path / "unpacked"))
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, timeout=60)
        assert "its config.json is that of a transformers llava" in inspected(tmp_path / "unpacked" / folder)
        shutil.rmtree(tmp_path / "unpacked")


def test_a_conversion_of_one_says_the_same(things: tuple[Path, dict[str, Path]]) -> None:
    """A command that is given such a thing names it, and what to type next, in its error."""
    root, paths = things
    named = 0
    with inside(root):
        for path in paths.values():
            text = inspected(path)
            if "can become" in text:
                continue
            found = CliRunner().invoke(app, ["convert", str(path), "--to", "hf", "-o", "never"])
            what = re.match(rf"{re.escape(str(path))}: (.*)", text)
            assert what is not None and found.exit_code in (3, 4)
            assert f"is {what[1]}: " in found.stderr and f"→ `{next_of(text)}`" in found.stderr
            named += 1
    assert named >= 30


def test_every_row_has_a_line_and_a_next_step() -> None:
    assert len(kinds()) >= 75
    assert [kind.line for kind in kinds()] == sorted(kind.line for kind in kinds())
    for kind in kinds():
        assert kind.line and kind.what[0].islower() == (not kind.what.startswith(("PEFT", "CLIP")))
        assert kind.next.split()[0] in ("llava-convert", "python", "7z")
