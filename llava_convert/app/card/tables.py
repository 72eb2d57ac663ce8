"""Markdown tables, and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SPACE = "\u00a0"  # a cell's line does not break at it


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar within a cell is no border."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def size(count: int) -> str:
    """Bytes, as the hub writes them."""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= limit:
            return f"{count / limit:.{2 if unit == 'GB' else 1}f}{_SPACE}{unit}"
    return f"{count}{_SPACE}B"
