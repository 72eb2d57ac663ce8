"""`inspect --html`: what a checkpoint is and says of itself, its sizes, what it can become and by which command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_convert.app.next_step import flags_of
from llava_convert.app.pages.html import bar, page, paragraph, preformatted, section, table, text
from llava_convert.core.text import human_bytes

if TYPE_CHECKING:
    from llava_convert.app.inspect import Inspection
    from llava_convert.app.options import SourceOptions


def inspect_page(found: Inspection, source: str, options: SourceOptions) -> str:
    """The page of a checkpoint, or of what is none; commands name `source` as it was given, with its options."""
    return page(
        str(found.path),
        paragraph(found.kind.replace("`", "")),
        section("What it is", _about(found)),
        section("Sizes by part", _parts(found)),
        section("Facts", table(("fact", "value"), [(text(k), text(v)) for k, v in found.settings.items()])),
        section(
            "What it can become",
            table(("layout", "possible", "command, or what is missing"), _targets(found, source, options)),
        ),
        section("Warnings", *(paragraph(one, "bad") for one in found.warnings)),
        section("Notes", *(paragraph(one, "soft") for one in found.notes)),
        section("Next", preformatted(found.next)),
        section("Details", *(paragraph(one, "soft") for one in found.details)),
    )


def _about(found: Inspection) -> str:
    rows = [("where", text(found.path)), ("use", text(found.use))]
    if found.layout is not None:
        rows[1:1] = [("layout", text(found.layout)), ("recognised by", text(found.why))]
    return table((), rows)


def _parts(found: Inspection) -> str:
    total = sum(part.bytes for part in found.parts)
    if not total:
        return ""
    rows = [
        (
            text(part.name), text(part.state), f"{part.tensors:,}", human_bytes(part.bytes) if part.tensors else "",
            bar(part.bytes / total) if part.bytes else "", text(", ".join(part.dtypes)), text(part.detail),
        )
        for part in found.parts
    ]  # fmt: skip
    said = f"{sum(part.tensors for part in found.parts):,} tensors, {human_bytes(total)}"
    return paragraph(said) + table(("part", "state", "tensors", "size", "share of all", "dtypes", "detail"), rows)


def _targets(found: Inspection, source: str, options: SourceOptions) -> Iterator[tuple[str, str, str]]:
    for layout, problem in found.targets.items():
        if problem is None:
            words = ["llava-convert", "convert", source, "--to", layout, *flags_of(options)]
            yield text(layout), '<span class="good">yes</span>', preformatted(shlex.join(words))
        else:
            yield text(layout), '<span class="bad">no</span>', text(problem)
