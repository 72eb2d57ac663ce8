"""The table in README.md says what the layouts' entries say, and has every source and every target."""

from __future__ import annotations

from llava_convert.layouts.info import LAYOUTS, TARGETS
from tests.docs.readme_table import README, page, table


def test_the_table_is_in_step() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == page(text), "layouts/info.py has changed: `make docs` writes the table"


def test_every_source_and_every_target_is_in_it() -> None:
    head, _, *rows = table().splitlines()
    assert [name for name in TARGETS if f"`{name}`" not in head] == []
    assert len(rows) == sum(len(info.forms) for info in LAYOUTS.values()) and all(
        info.forms for info in LAYOUTS.values()
    )
    assert {row.count("|") for row in (head, *rows)} == {len(TARGETS) + 2}
