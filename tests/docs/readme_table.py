"""The table of sources and targets in both READMEs, of `layouts/info.py`: `python -m tests.docs.readme_table`."""

from __future__ import annotations

from pathlib import Path

from llava_convert.layouts.info import LAYOUTS, TARGETS

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- sources: `make docs` writes this table -->", "<!-- end of sources -->"


def table() -> str:
    """One row for each form that a source may have, one column for each target."""
    columns = [
        f"`{name}` ({', '.join(LAYOUTS[name].loaders)})" if LAYOUTS[name].loaders else f"`{name}`" for name in TARGETS
    ]
    lines = [f"| from ↓  to → | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, info in LAYOUTS.items():
        for number, form in enumerate(info.forms):
            first = "" if number else f"**`{name}`** "
            cells = ["no" if to in form.never else "itself" if to == name else "yes" for to in TARGETS]
            lines.append(f"| {first}{form.text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The README with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for one in (README, README.with_suffix(".zh-CN.md")):
        one.write_text(page(one.read_text(encoding="utf-8")), encoding="utf-8")
