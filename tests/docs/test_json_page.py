"""docs/json.md and docs/schemas say what the commands' descriptions say."""

from __future__ import annotations

from tests.docs.json_page import DOCS, files


def test_the_page_and_the_schemas_are_in_step() -> None:
    made = files()
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is of another description: `make docs` writes it"
    assert set((DOCS / "schemas").iterdir()) == {path for path in made if path.parent.name == "schemas"}
