"""What is known of layouts without opening a file: asked of their entries alone, and whole for each of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_convert
from llava_convert.app.card.words import Words
from llava_convert.layouts.info import LAYOUTS, TARGETS, Card

PACKAGE = Path(llava_convert.__file__).parent
FOLDER = PACKAGE / "layouts"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if FOLDER not in path.parents)

# Strings that are spelled as a layout's name and mean something else.
OTHER_THINGS = {
    # A runtime of `verify --logits`, of that name as well.
    "app/jobs/look.py": {"official"},
    "app/logits/by_llava.py": {"official"},
    "app/logits/runtimes.py": {"official"},
    "core/hub_names.py": {"hf"},  # the scheme of the Hugging Face Hub's addresses
    "storage/hubs/__init__.py": {"hf"},
    "engine/check.py": {"gguf"},  # a container: how a file holds tensors
    "engine/record.py": {"gguf"},
    "engine/shards.py": {"gguf"},
    "model/adapter.py": {"peft"},  # the table of the names that peft gives
    "model/target.py": {"gguf", "pth"},  # suffixes, too
    "storage/headers.py": {"gguf"},
    "model/tables/families.py": {"official", "gguf"},  # sections of a family's table
}


def folders_in(tree: ast.AST) -> Iterator[str]:
    """Layouts whose folders a module imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not getattr(node, "level", 0), "imports are absolute in this package"
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                within = f"{origin}{alias.name}".partition("llava_convert.layouts.")[2].partition(".")[0]
                yield from {within} & LAYOUTS.keys()


def names_in(tree: ast.AST) -> Iterator[str]:
    """Layouts that a module names: as a string of its own, as a keyword, or by importing from their folders."""
    yield from folders_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in LAYOUTS:
            yield str(node.value)
        elif isinstance(node, ast.keyword) and node.arg in LAYOUTS:
            yield str(node.arg)


def test_no_module_elsewhere_names_a_layout() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): set(names_in(ast.parse(path.read_text(encoding="utf-8"))))
        for path in MODULES
    }
    assert {module: names for module, names in found.items() if names} == OTHER_THINGS


@pytest.mark.parametrize(
    "code",
    [
        'if layout == "hf": pass',
        'words = {"gguf": 1}',
        "words = dict(gguf=1)",
        "from llava_convert.layouts.xtuner import read",
        "from llava_convert.layouts import official",
        "import llava_convert.layouts.pth.read",
    ],
)
def test_each_way_to_name_one_is_seen(code: str) -> None:
    assert len(set(names_in(ast.parse(code)))) == 1


def test_entries_import_no_reader_and_no_writer() -> None:
    """Nor NumPy, nor the model: `--help` and TAB ask them."""
    code = "import sys, llava_convert.layouts.info\nprint(*(m for m in sys.modules if m.startswith('llava_convert')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    rooms = {name.split(".")[1] for name in loaded if "." in name}
    assert rooms == {"_version", "core", "layouts"}
    assert {name for name in loaded if ".layouts." in name} == {"llava_convert.layouts.info"}


def test_each_layout_has_a_folder() -> None:
    assert set(LAYOUTS) == {path.parent.name for path in FOLDER.glob("*/__init__.py")}


def test_no_layout_knows_another() -> None:
    """Nor does what they share know one of them: the registry imports each by its name."""
    found = {
        path.relative_to(FOLDER).as_posix(): set(folders_in(ast.parse(path.read_text(encoding="utf-8"))))
        for path in FOLDER.rglob("*.py")
        if path.parent.name != "projector_code"  # which runs elsewhere, as a part of an output
    }
    assert {module: folders for module, folders in found.items() if folders - {module.partition("/")[0]}} == {}


def cards() -> list[Card]:
    kinds = [(t.whole, t.language_model, t.vision_tower, t.projector) for t in TARGETS.values()]
    return [card for cards in kinds for card in cards if card is not None]


def test_what_is_next_has_words_that_are_known() -> None:
    texts = [text for card in cards() for text in (card.next or "", *card.next_in.values())]
    words = [piece.partition(">>")[0] for text in texts for piece in text.split("<<")[1:]]
    assert words and all(isinstance(getattr(Words, word, None), property) for word in words)


def test_repositories_of_a_release_differ() -> None:
    suffixes = [target.repo_suffix for target in TARGETS.values()]
    assert len(set(suffixes)) == len(suffixes)


@pytest.mark.parametrize(
    ("to", "part"),
    [
        (to, part)
        for to, target in TARGETS.items()
        for part in ("all", "llm", "visual-encoder", *(("projector",) if target.projector is not None else ()))
        if not target.adapters_alone or part == "visual-encoder"  # of which alone the source has an adapter
    ],
)
def test_each_target_has_a_card_of_each_part(tiny: Path, tmp_path: Path, to: str, part: str) -> None:
    more = {"dtype": "float16"} if to == "pth" else {}  # which the source is already
    planned = llava_convert.convert(tiny / "iter_2.pth", to=to, part=part, out=tmp_path / "out", dry_run=True, **more)
    assert planned.documents.keys() == {"README.md", "conversion.json"} and min(planned.documents.values()) > 1000
