"""docs/json.md and docs/schemas out of `llava_convert.cli.schemas`: `python -m tests.docs.json_page` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_convert.cli._output import SCHEMA
from llava_convert.cli.schemas import DOCUMENTS, Document, schema, schema_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "json.md"
HEAD = f"""\
# Output for programs

With `--json` a command prints one object on stdout and nothing else there; notes, warnings and errors are on stderr as
ever. The same thing has the same key in every command: `source` and its `layout`, `out` and `to`, `files` with `name`
and `bytes`, `notes`, `warnings`. Python's results give the same by `as_json()`, without the three keys that each object
begins with.

Each object is described by a JSON Schema, in a file that its section names. The number under `schema` is {SCHEMA} for
all of them. It goes up when a key goes or means something else; new keys may come without that. This page is made of
the same description by `make docs`.

An error is an object, too, with the exit code of the command: also a usage error, an interruption (130) and a bug (1).
`verify` of models that differ prints what it found, and ends with 7.

```console
$ llava-convert convert SOURCE --to hf --dry-run --json | jq '.files[] | select(.tensors) | .name'
$ llava-convert inspect SOURCE --json | jq -r '.targets | to_entries[] | select(.value.possible) | .key'
```
"""


def files() -> dict[Path, str]:
    """Every file that is made, with its text."""
    made = {DOCS / "schemas" / f"{name}.json": json.dumps(schema(name), indent=2) + "\n" for name in DOCUMENTS}
    return made | {PAGE: "\n".join(_page())}


def _page() -> Iterator[str]:
    yield HEAD
    yield from _table("Every object", schema_of(Document))
    common = schema_of(Document)["properties"].keys()
    for name in DOCUMENTS:
        own = schema(name)
        own["properties"] = {key: value for key, value in own["properties"].items() if key not in common}
        own["description"] += f" Its schema: [{name}.json](schemas/{name}.json)."
        yield from _table(f"`{name}`", own)


def _table(title: str, about: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{about['description']}\n"
    yield "| key | type | what |\n|---|---|---|"
    yield from _rows(about, "")
    yield ""


def _rows(about: Mapping[str, Any], within: str) -> Iterator[str]:
    for key, value in about["properties"].items():
        optional = "" if key in about["required"] else ", or absent"
        yield f"| `{within}{key}` | {_type(value)}{optional} | {value.get('description', '')} |"
        inner, path = value, f"{within}{key}"
        while "items" in inner or isinstance(inner.get("additionalProperties"), dict):
            path += "[]" if "items" in inner else ".*"
            inner = inner["items"] if "items" in inner else inner["additionalProperties"]
        if "properties" in inner:
            yield from _rows(inner, f"{path}.")


def _type(value: Mapping[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_type(one) for one in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{json.dumps(word)}`" for word in value["enum"])
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    return str(value.get("type", "anything"))


if __name__ == "__main__":
    (DOCS / "schemas").mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
