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

With `--json` a command prints one object on stdout, and nothing else. Notes, warnings and errors go to stderr, as
without `--json`. All commands use the same keys: `source` and its `layout`, `out` and `to`, `files` with `name` and
`bytes`, `notes`, `warnings`. In Python, `as_json()` of a result gives the same object, without the first three keys.

Each object has a JSON Schema. The section of the object links to the file. The number under `schema` is {SCHEMA} for
all of them. It goes up when a key is removed or changes its meaning. New keys may be added without a new number.
`make docs` writes this page from the same description.

An error is an object, too, with the exit code of the command. This includes usage errors, interruptions (130) and bugs
(1). If `verify` finds a difference, it prints the usual object, and the exit code is 7.

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
    yield "| key | type | meaning |\n|---|---|---|"
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
