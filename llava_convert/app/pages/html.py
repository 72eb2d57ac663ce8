"""The frame of a page and its pieces: no script, nothing from elsewhere, readable on a phone, in light and in dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_convert._version import __version__
from llava_convert.core.errors import OutputError
from llava_convert.core.text import utf8

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDEST = 360  # pixels of a picture in a page

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #5b6068; --line: #d9dce1; --card: #f5f6f8;
  --good: #13713b; --bad: #b3261e; --bar: #3b6fd4; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --text: #e6e8eb; --soft: #a2a8b1; --line: #363a40;
  --card: #1e2125; --good: #63c88c; --bad: #ff8a80; --bar: #7aa5f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.bar.bad { background: var(--bad); } .cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
.card img { width: 100%; max-height: 15rem; object-fit: contain; border-radius: 4px; display: block; }
pre { white-space: pre-wrap; margin: .3rem 0; font: .85rem/1.4 ui-monospace, monospace; }
"""


def text(value: object) -> str:
    """A stranger's text, as text."""
    return html.escape(str(value))


def page(title: str, *sections: str) -> str:
    """A whole page of finished sections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(section for section in sections if section)
        + f'\n<p class="soft">Made by llava-convert {__version__}.</p>\n</body></html>\n'
    )


def section(heading: str, *parts: str) -> str:
    """A heading and finished parts; nothing where these are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(heading)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(said: object, kind: str = "") -> str:
    return f'<p class="{kind}">{text(said)}</p>' if kind else f"<p>{text(said)}</p>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished cells; nothing without rows."""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>' if body else ""


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


def write(path: Path, made: str) -> None:
    """Raises OutputError."""
    try:
        path.write_bytes(utf8(made))
    except OSError as problem:
        raise OutputError(f"{path}: {problem.strerror or problem}", hint="--report takes a file to write") from problem
