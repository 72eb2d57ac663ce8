"""docs/python-api.md out of the public names and their docstrings: `python -m tests.docs.api_page` writes it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_convert

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"
HEAD = """\
# Python API

Every public name of `llava_convert`, with its docstring; `make docs` makes this page of them.
Examples, and how keywords relate to options: [from Python](python.md).
"""
_SECTIONS = ("Functions", "Results", "Errors")


def page() -> str:
    """The whole page."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield HEAD
    for section in _SECTIONS:
        yield f"## {section}\n"
        for name in llava_convert.__all__:
            one = getattr(llava_convert, name)
            if _section(one) == section:
                yield f"### {name}\n"
                yield from _function(one) if section == "Functions" else _class(one)


def _section(one: Any) -> str:
    if not inspect.isclass(one):
        return "Functions"
    return "Errors" if issubclass(one, Exception) else "Results"


def _function(one: Any) -> Iterator[str]:
    signature = inspect.signature(one)
    about, _, texts = inspect.getdoc(one).partition("\n\n\n")
    yield _text(about) + "\n"
    yield f"Returns `{_type(signature.return_annotation)}`.\n"
    told = dict(re.findall(r"^(\w+): (.*)$", texts, re.M))
    yield "| keyword | type | default | what |\n|---|---|---|---|"
    for name, parameter in signature.parameters.items():
        default = "needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        kind = _type(parameter.annotation).replace("|", "\\|")
        yield f"| `{name}` | `{kind}` | {default} | {told.get(name, '').replace('|', chr(92) + '|')} |"
    yield ""


def _class(one: Any) -> Iterator[str]:
    yield _text(inspect.getdoc(one) or "") + "\n"
    rows = [(field.name, _type(field.type)) for field in _fields(one)]
    rows += [
        (name, _type(inspect.get_annotations(value.fget, eval_str=True).get("return", "")))
        for name, value in vars(one).items()
        if isinstance(value, property) and not name.startswith("_")
    ]
    if rows:
        yield "| attribute | type |\n|---|---|"
        yield from (f"| `{name}` | `{kind.replace('|', chr(92) + '|')}` |" for name, kind in rows)
        yield ""
    calls = [name for name, value in vars(one).items() if inspect.isfunction(value) and not name.startswith("_")]
    if calls:
        yield "| method | what |\n|---|---|"
        for name in calls:
            about = _text(inspect.getdoc(getattr(one, name)) or "")
            yield f"| `{name}()` | {about.partition(chr(10))[0]} |"
        yield ""


def _fields(one: Any) -> tuple[Any, ...]:
    fields = dataclasses.fields(one) if dataclasses.is_dataclass(one) else ()
    return tuple(field for field in fields if not field.name.startswith("_"))


def _type(annotation: Any) -> str:
    """A type as people write it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def _text(docstring: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", docstring.strip())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
