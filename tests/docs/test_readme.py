"""README.md: its picture is what the commands print, and its links, absolute for PyPI, lead to files that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.picture import COMMANDS, PICTURE, picture

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "README.zh-CN.md")
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
RAW = URLS["Homepage"].replace("github.com", "raw.githubusercontent.com")


@pytest.mark.slow
def test_the_picture_is_what_is_printed() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "`make docs` draws it again"
    assert PICTURE.stat().st_size < 100_000
    assert [command.split()[0] for command in COMMANDS] == ["inspect", "pth", "verify"]


def test_the_picture_asks_no_server() -> None:
    addresses = set(re.findall(r"https?://[^\s\"')]+", PICTURE.read_text(encoding="utf-8")))
    assert addresses <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    ours = [link for link in links if link.startswith((URLS["Homepage"], RAW))]
    assert len(ours) > 15
    assert [link for link in links if not link.startswith(("https://", "#"))] == []  # PyPI knows no other files
    found = [re.sub(r"^https://[^/]+/[^/]+/[^/]+/(blob/)?main/", "", link).split("#")[0] for link in ours]
    assert [path for path in found if not (ROOT / path).exists()] == []
