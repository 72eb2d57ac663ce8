"""docs/families.md says what the tables say."""

from __future__ import annotations

from llava_convert.model.tables.families import architectures
from tests.docs.families_page import PAGE, page


def test_the_page_is_in_step() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "mappings has changed: `make docs` writes docs/families.md"


def test_every_family_is_on_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [
        t for a in architectures().values() if a.part != "projector" for t in a.model_types if f"`{t}`" not in text
    ] == []
    assert "| internlm2 | `internlm2` | as llama | exit 4 | as llama | `llama` |" in text
    assert "| `anyres` | `llava_next` | exit 4 | exit 4 |" in text and "| siglip |" in text
