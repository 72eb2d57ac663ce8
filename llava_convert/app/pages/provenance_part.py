"""The part of a report that says where its models come from, and by which command and versions it was made."""

from __future__ import annotations

from collections.abc import Mapping

from llava_convert.app.pages.html import lines, paragraph, preformatted, section, table, text
from llava_convert.app.provenance import Made


def provenance_part(sides: Mapping[str, Mapping[str, str]], made: Made) -> str:
    """`sides` by heading, each with what is known of it by name."""
    names = list(dict.fromkeys(name for one in sides.values() for name in one))
    rows = [(text(name), *(lines(one.get(name, "")) for one in sides.values())) for name in names]
    return section(
        "Where it comes from",
        table(("", *sides), rows),
        paragraph(f"Made on {made.date} by"),
        preformatted(made.command),
        paragraph(", ".join(f"{name} {number}" for name, number in made.versions.items()), "soft"),
    )
