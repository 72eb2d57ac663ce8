"""What an error tells to do instead is done as it is told; no hint names an option or a command that does not exist."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.cli._commands import COMMANDS as TABLE

ROOT = Path(llava_convert.__file__).resolve().parents[1]
GROUP: Any = typer.main.get_command(app)
WHOLE: dict[str, Any] = {name: one.whole(name) for name, one in TABLE.items()}
# The second words of a command that has some (`data check`), by its first.
COMMANDS: dict[str, dict[str, Any]] = {name: getattr(c, "commands", {}) for name, c in WHOLE.items()}
RUN = [c for name, first in WHOLE.items() for c in (COMMANDS[name].values() or [first])]
OPTIONS = {option for command in (GROUP, *RUN) for param in command.params for option in param.opts} | {"--help"}
# of git, llama-server, pip, the llava package and its apply_delta, and convert_refcoco.py of xtuner
OTHERS = {"--depth", "--mmproj", "--no-deps", "--upgrade", "--conv-mode"}
OTHERS |= {"--base-model-path", "--target-model-path", "--delta-path"}
OTHERS |= {"--ann-path", "--image-path", "--save-path"}  # of convert_refcoco.py in xtuner


def texts(path: Path) -> Iterator[str]:
    """The strings of a module that may be printed: all but the docstrings, with a gap where a value stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.value


ALL = [
    (path.relative_to(ROOT).as_posix(), text)
    for room in ("llava_convert", "training")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "card" not in path.parts  # whose commands are those of other programs: tests/interop/test_card_commands.py
    for text in texts(path)
]


def test_hints_name_commands_that_exist() -> None:
    said = re.compile(r"llava-convert ([a-z]+)(?: ([a-z-]+))?")
    found = {(where, *match.groups()) for where, text in ALL for match in said.finditer(text)}
    wrong = {
        (where, first, second)
        for where, first, second in found
        if first not in COMMANDS or (COMMANDS[first] and second not in COMMANDS[first])
    }
    assert len(found) >= 5 and wrong == set()


def test_hints_name_options_that_exist() -> None:
    said = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    found = {(where, option) for where, text in ALL for option in said.findall(text)}
    assert len(found) > 50
    assert {(where, option) for where, option in found if option not in OPTIONS | OTHERS} == set()


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def hint(found: Any, code: int) -> str:
    """What a refused command tells to do."""
    assert found.exit_code == code, found.output
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("  → ")]
    return str(line.removeprefix("  → "))


@pytest.fixture
def moved(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint where nothing leads to its base models."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(tiny / "iter_2.pth", tmp_path))


def test_bases_that_are_missing(tiny: Path, moved: Path) -> None:
    words: list[str | Path] = ["pth", moved, "--to", "hf", "-o", "out"]
    for option, base in (("--llm", tiny / "llm"), ("--visual-encoder", tiny / "vit")):
        assert option in hint(run(*words), 3)
        words += [option, base]
    assert run(*words).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pth", "{tiny}/iter_2.pth", "--to", "hf", "-o", "{made}/official"], 6, ["--force"]),
        (["pth", "{tiny}/iter_2.pth", "--to", "gguf", "--part", "projector"], 2, ["--part", "visual-encoder"]),
        (["official", "{made}/official", "--to", "official"], 4, ["--dtype", "bfloat16"]),
        (["gguf", "{made}/gguf", "--to", "official"], 4, ["--dequantize"]),
    ],
    ids=["OUT exists", "a part that is none", "the same layout", "a quantised source"],
)
def test_what_is_to_be_added(
    tiny: Path, made: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    """The command again, with what the hint names, is done."""
    command = [word.format(tiny=tiny, made=made) for word in arguments]
    command += [] if "-o" in command else ["-o", str(tmp_path / "out")]
    assert words[0] in hint(run(*command), code)
    assert run(*command, *words).exit_code == 0


@pytest.fixture
def made(tiny: Path, tmp_path: Path) -> Path:
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "official")
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", outtype="q8_0", out=tmp_path / "gguf")
    return tmp_path


def test_another_layouts_command(tiny: Path, tmp_path: Path) -> None:
    source, rest = tiny / "iter_2.pth", ("--to", "official", "-o", tmp_path / "out")
    told = hint(run("hf", source, *rest), 4)
    said = re.fullmatch(rf"use `llava-convert (\w+) {re.escape(str(source))}`, or `(\w+)`, which detects it", told)
    assert said is not None
    for number, command in enumerate(said.groups()):
        assert run(command, source, "--to", "official", "-o", tmp_path / f"{number}").exit_code == 0


def test_a_hint_about_data_names_the_recipe_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change = ["--set", "data.root=a b", "--set", "model.pretrained="]
    found = CliRunner().invoke(app, ["train", "llava_v15_7b_finetune", *change])
    assert found.exit_code == 3
    command = re.search(r"`llava-convert (.*?)` says what is missing", found.stderr)
    assert command is not None
    told = CliRunner().invoke(app, shlex.split(command[1]))
    assert (told.exit_code, command[1]) == (
        3,
        "data check llava_v15_7b_finetune --set 'data.root=a b' --set model.pretrained=",
    )
