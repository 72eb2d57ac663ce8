"""Every command that README and docs show is run as it stands there, page by page, in one folder with what it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import llava_convert
from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope
from tests.interop.printed_commands import words
from tests.remotes.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
# What inspect-forty.md and cli-tour.md show is made of the commands, by test_forty.py and test_tour.py of tests/docs.
# The Chinese pages have the same commands, by tests/docs/test_chinese.py.
MADE = ("inspect-forty", "cli-tour")
ENGLISH = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "zh" not in p.parts and p.stem not in MADE]
PAGES = [ROOT / "README.md", *ENGLISH]
BLOCK = re.compile(r"```console\n(.*?)```", re.S)
COMMAND = re.compile(r"^\$ (llava-convert(?:[^\n]*\\\n)*[^\n]*)$", re.M)

# What stands for something of the reader's own.
WORDS = {
    "SOURCE": "iter_N.pth", "OUT": "the-output", "RECIPE": "tiny-shapes",
    "llava-llama-3-8b-gguf/NAME-q4_k_m.gguf": "llava-llama-3-8b-gguf/llava-llama-3-8b-gguf-q4_k_m.gguf",
}  # fmt: skip
# What is not run here, and why.
LEFT = {
    r"s3://": "tests/remotes/test_urls.py, test_shares.py and test_sweep.py do, beside a store",
    r"llava-fp8|mine\.toml": "tests/field/test_quantised.py and test_unknown_modules.py do",
    r"train (?!.*(--dry-run|--list|my-data))": "minutes; tests/training trains",
    r"data check RECIPE --set data\.root|data fix-ocrvqa": "wants the data sets",
}


def commands(page: Path) -> list[str]:
    return [found for block in BLOCK.findall(page.read_text(encoding="utf-8")) for found in COMMAND.findall(block)]


def asked(line: str) -> list[str]:
    """The words of a command without its comment and without what its output is piped into."""
    program, *rest = words(re.split(r" (?:#|\| )", line)[0])
    assert program == "llava-convert"
    return [WORDS.get(word, word) for word in rest]


@pytest.fixture
def folder(layouts: dict[str, Path], tiny: Path, tmp_path: Path) -> Path:
    """A folder with everything that the pages name."""
    for name in ("llm", "vit"):
        shutil.copytree(tiny / name, tmp_path / "tiny" / name)
    runs = ("work_dirs/llava_llama3/iter_39620.pth", "work_dirs/run/iter_1000.pth", "run/iter_2000.pth")
    for name in ("iter_N.pth", "iter_39620.pth", *runs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / "iter_2.pth", tmp_path / name)
    shutil.copytree(tiny, tmp_path / "fixtures" / "tiny")
    shutil.copytree(layouts["official"], tmp_path / "llava-v1.5-7b")
    for name in ("llava-v1.5-7b-hf", "my-llava", "the-output"):
        shutil.copytree(layouts["hf"], tmp_path / name)
    shutil.copy(layouts["gguf"] / "tiny-f16.gguf", tmp_path / "llava-f16.gguf")
    _adapter(layouts["hf"], tiny, tmp_path)
    _own_data(tiny, tmp_path)
    return tmp_path


def _adapter(whole: Path, tiny: Path, folder: Path) -> None:
    """A base, and an adapter for it."""
    shutil.copytree(whole, folder / "llava-base")
    (folder / "llava-base" / "conversion.json").unlink()  # which would say that the adapter is merged in already
    llava_convert.convert(tiny / "iter_2.pth", to="peft", part="visual-encoder", out=folder / "my-lora")


def _own_data(tiny: Path, folder: Path) -> None:
    """The files that the tutorial on training asks its reader to write, as the page has them."""
    page = (ROOT / "docs" / "tutorials" / "train-your-own-data.md").read_text(encoding="utf-8")
    row, recipe = (re.findall(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("json", "toml"))
    images = folder / "my-data" / "images"
    images.mkdir(parents=True)
    shutil.copy(tiny / "picture.png", images / json.loads(row[0])["image"])
    (folder / "my-data" / "train.jsonl").write_text(row[0])
    (folder / "my-data.toml").write_text(recipe[0])


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.stem)
def test_every_command_of_a_page(
    page: Path, command: Command, hf: HuggingFace, ms: ModelScope, folder: Path, layouts: dict[str, Path], tiny: Path
) -> None:
    hf.add("org/llava-8b", layouts["hf"])
    hf.add("liuhaotian/llava-v1.5-7b", layouts["official"])
    for line in commands(page):
        if any(re.search(left, line) for left in LEFT):
            continue
        told = asked(line)
        named = folder / told[told.index("-o") + 1] if "-o" in told else None
        if named is not None and named.exists():  # of an earlier command of the page
            shutil.rmtree(named)
        if told[0] == "verify" and not (folder / told[2]).exists() and "://" not in told[2]:
            made = command("convert", told[1], "--to", told[2].rpartition("-")[2], "-o", told[2])
            assert made.code == 0, made.stderr
        ran = command(*told)
        assert ran.code == 0, f"{line}\n{ran.stderr}"


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
