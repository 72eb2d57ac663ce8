"""docs/cli.md says what the commands' help says."""

from __future__ import annotations

from tests.docs.cli_page import PAGE, page


def test_the_page_is_in_step() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "the page is of other commands: `make docs` writes it"
