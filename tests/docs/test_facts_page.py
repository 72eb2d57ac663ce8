"""docs/facts.md says what the tables say."""

from __future__ import annotations

from llava_convert.model.tables.facts import facts, tables_of
from tests.docs.facts_page import FILES, PAGE, page


def test_the_page_is_in_step() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "mappings/facts has changed: `make docs` writes docs/facts.md"


def test_every_fact_and_every_table_is_on_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in facts() if f"### {name}\n" not in text] == []
    found = {t.name for layout in ("official", "hf", "xtuner") for f in ("config.json", "projector/config.json")
             for t in tables_of(layout, f)}  # fmt: skip
    assert found == {"official", "hf", "projector"} <= FILES.keys()
    assert len(text) < 40_000 and "None" not in text
