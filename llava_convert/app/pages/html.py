"""The frame of a page and its pieces: no script, nothing from elsewhere, readable on a phone, in light and in dark."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_convert._version import __version__
from llava_convert.core.errors import OutputError
from llava_convert.core.text import utf8

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = Path(__file__).with_name("style.css")
_WIDEST = 360  # pixels of a picture in a page
_SHORT = 14  # characters of a cell that stays on one line
_SIDE_BY_SIDE = 3  # cells that a phone has room for
_TAG = re.compile("<[^>]*>")


def text(value: object) -> str:
    """A stranger's text, as text."""
    return html.escape(str(value))


def page(title: str, *sections: str) -> str:
    """A whole page of finished sections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{_STYLE.read_text(encoding='utf-8')}</style></head><body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(section for section in sections if section)
        + f'\n<p class="soft">Made by llava-convert {__version__}.</p>\n</body></html>\n'
    )


def section(heading: str, *parts: str) -> str:
    """A heading and finished parts; nothing where these are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(heading)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(said: object, kind: str = "") -> str:
    return f'<p class="{kind}">{text(said)}</p>' if kind else f"<p>{text(said)}</p>"


def preformatted(said: object) -> str:
    """A command, or what a model said, as it stands."""
    return f"<pre>{text(said)}</pre>"


def lines(said: str) -> str:
    """The lines of a cell."""
    return "".join(f"<div>{text(line)}</div>" for line in said.splitlines())


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished cells; nothing without rows.

    On a phone a row of many cells is a block, with the head before each, and a short cell is never broken.
    """
    body = "".join("<tr>" + "".join(_cell(cell, i, heads) for i, cell in enumerate(row)) + "</tr>" for row in rows)
    top = "".join(f"<th{' class=short' if len(head) <= _SHORT else ''}>{text(head)}</th>" for head in heads)
    kind = ' class="stack"' if len(heads) > _SIDE_BY_SIDE else ""
    head = f"<tr>{top}</tr>" if heads else ""
    return f'<div class="wide"><table{kind}>{head}{body}</table></div>' if body else ""


def _cell(cell: str, place: int, heads: Sequence[str]) -> str:
    bare = _TAG.sub("", cell)
    made = "<td"
    if '<span class="bar' in cell:
        made += ' class="bars"'
    elif 0 < len(bare) <= _SHORT:
        made += ' class="short"'
    if heads and heads[place] and bare:
        made += f' data-head="{html.escape(heads[place], quote=True)}"'
    return f"{made}>{cell}</td>"


def counted(number: int, one: str, many: str) -> str:
    """`1 fact`, `2 facts`."""
    return f"{number:,} {one if number == 1 else many}"


def bar(share: float, *, bad: bool = False) -> str:
    """A bar of a share of its column, 0 to 1."""
    return f'<span class="bar{" bad" if bad else ""}" style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></span>'


def picture(shown: Image, about: str) -> str:
    """A picture within the page, made small; `about` is read out where it cannot be seen."""
    small = shown.copy()
    small.thumbnail((_WIDEST, _WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(about, quote=True)}" src="data:image/png;base64,{data}">'


def cards(every: Iterable[str]) -> str:
    inner = "".join(f'<div class="card">{one}</div>' for one in every)
    return f'<div class="cards">{inner}</div>' if inner else ""


def write(path: Path, made: str, *, flag: str = "--report") -> None:
    """Raises OutputError."""
    try:
        path.write_bytes(utf8(made))
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror or problem}", hint=f"{flag} takes a file to write") from problem
