"""Read configs by mmengine, xtuner's own and ours: `read_configs.py RESULT`, with {name: path of ours} on stdin.

RESULT gets, by name, {"theirs": …, "ours": …}: every field of the config, by its path (`model.llm.type`); null for a
name that xtuner does not have. Classes and functions are written by name, a prompt template by its content.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xtuner
from mmengine.config import Config

FOLDER = Path(xtuner.__file__).parent / "configs"


def fields(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts and lists, by its path."""
    inner = None
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        inner = enumerate(value)
    if inner is None or not value:
        yield at, plain(value)
        return
    for key, one in inner:
        yield from fields(one, f"{at}.{key}" if at else str(key))


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, str | int | float):
        return value
    owner = getattr(value, "__self__", None)
    name = getattr(value, "__qualname__", None) or str(value)
    # A class method is that of the class it was asked of, wherever it was written.
    return f"{owner.__name__}.{value.__name__}" if isinstance(owner, type) else name


def read(path: Path) -> dict[str, Any]:
    config = Config.fromfile(str(path))
    return dict(fields({key: config[key] for key in config}))


def main() -> None:
    found = {}
    for name, ours in json.load(sys.stdin).items():
        theirs = next(iter(sorted(FOLDER.rglob(f"{name}.py"))), None)
        found[name] = theirs and {"theirs": read(theirs), "ours": read(Path(ours))}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
