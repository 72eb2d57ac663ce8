"""docs/python-api.md says what the docstrings say, and docs/conversion-json.md has every key of a record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import llava_convert
from tests.docs.api_page import PAGE, page

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"


def test_the_page_is_in_step() -> None:
    text = page()
    assert PAGE.read_text(encoding="utf-8") == text, "docstrings have changed: `make docs` writes the page"


def test_every_public_name_is_explained() -> None:
    sections = re.split(r"^### ", page(), flags=re.M)[1:]
    assert sorted(section.split()[0] for section in sections) == sorted(llava_convert.__all__)
    assert [section.split()[0] for section in sections if len(section.splitlines()[2]) < 20] == []


def test_every_key_of_a_record_is_explained(tmp_path: Path) -> None:
    llava_convert.convert(TINY / "iter_2.pth", to="hf", out=tmp_path / "out", verify="full")
    found = json.loads((tmp_path / "out" / "conversion.json").read_text(encoding="utf-8"))
    text = PAGE.with_name("conversion-json.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w.\[\]]+)`", text, re.M))
    assert set(found) <= told
    nested = {f"tool.{key}" for key in found["tool"]} | {f"verified.{key}" for key in found["verified"]}
    nested |= {f"sources[].{key}" for one in found["sources"] for key in one}
    nested |= {f"tensors[].{key}" for one in found["tensors"].values() for key in one}
    nested |= {f"added.{key}" for key in found["added"]}
    assert nested - told == set()
