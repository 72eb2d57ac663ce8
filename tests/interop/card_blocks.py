"""The code blocks of a model card, as they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading above it, the language behind its fence, the lines."""

    section: str
    language: str
    code: str


def blocks(folder: Path) -> list[Block]:
    """Every fenced block of a folder's card, in order."""
    found: list[Block] = []
    section, heading = "", False
    text = (folder / "README.md").read_text(encoding="utf-8")
    for token in MarkdownIt("commonmark").parse(text.split("\n---\n", 1)[1]):
        if token.type == "heading_open":
            heading = True
        elif token.type == "inline" and heading:
            section, heading = token.content, False
        elif token.type == "fence":
            found.append(Block(section, token.info, token.content))
    return found


def block(folder: Path, section: str, language: str = "python", number: int = 0) -> str:
    """The code of the block of that number, of those in a section and a language."""
    return [b for b in blocks(folder) if (b.section, b.language) == (section, language)][number].code
