"""The Chinese pages are in step with the English ones: the same headings by level, the same code, the same tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# The index is a list of what there is in Chinese, and the page of no English one.
OWN = {DOCS / "zh" / "index.md"}
PAIRS = {page: DOCS / page.relative_to(DOCS / "zh") for page in sorted((DOCS / "zh").rglob("*.md")) if page not in OWN}
PAIRS[ROOT / "README.zh-CN.md"] = ROOT / "README.md"
CODE = re.compile(r"^```.*?^```$", re.M | re.S)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def _read(page: Path) -> tuple[list[str], list[str], str]:
    """Code blocks, marks of headings, and the text without code."""
    text = page.read_text(encoding="utf-8")
    prose = CODE.sub("", text)
    return CODE.findall(text), re.findall(r"^(#+) ", prose, re.M), prose


@pytest.mark.parametrize("chinese", PAIRS, ids=lambda page: page.stem)
def test_a_page_is_in_step(chinese: Path) -> None:
    (code, headings, text), (code_there, headings_there, text_there) = _read(chinese), _read(PAIRS[chinese])
    assert code == code_there, f"{PAIRS[chinese].name} has other commands"
    assert headings == headings_there, f"{PAIRS[chinese].name} has other headings"
    if chinese.parent != ROOT:  # the README's options are a choice of them
        assert text.count("\n|") == text_there.count("\n|"), f"{PAIRS[chinese].name} has other rows"
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.match(r"[A-Za-z\u4e00-\u9fff`]", part)]
    assert [part for part in paragraphs if not CHINESE.search(part)] == []  # nothing was left in English


def test_every_tutorial_is_there() -> None:
    tutorials = {page.name for page in (DOCS / "tutorials").glob("*.md")}
    assert {page.name for page in (DOCS / "zh" / "tutorials").glob("*.md")} == tutorials
    assert DOCS / "zh" / "troubleshooting.md" in PAIRS


def test_the_table_of_the_readme_is_the_same() -> None:
    tables = [
        re.findall(r"<!-- sources.*<!-- end of sources -->", (ROOT / name).read_text(encoding="utf-8"), re.S)
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert tables[0] and tables[0] == tables[1], "`make docs` writes both"
