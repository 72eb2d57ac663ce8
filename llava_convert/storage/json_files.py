"""JSON from files that others wrote: bounded in size, strict in form, and wrong with a line and a column."""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.text import printable
from llava_convert.storage.files import read_file, reject_stand_in

# The largest JSON file of a real model is a tokenizer.json of 33 MB (Gemma 3).
MAX_JSON_BYTES = 64 << 20
# Values cost up to 64 bytes each once parsed, so few bytes of `[],[],` could fill the memory. That tokenizer.json has
# about 2.5 million; 5 million stay below 400 MB.
MAX_JSON_VALUES = 5_000_000
# What is read is gone by with functions that call themselves. A tokenizer.json has 12 levels.
MAX_JSON_DEPTH = 64

_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, unique_keys: bool = False) -> Any:
    """What the JSON file `path` says; at most `limit` bytes are read.

    Raises InputError with path, line and column (both from 1, in characters) for anything that is not JSON in UTF-8
    as RFC 8259 has it: a byte order mark, a trailing comma, NaN or Infinity. Also where it is missing, not readable,
    no regular file, too large, or, with `unique_keys`, where an object names a key twice (fault rows 30, 32).
    """
    return parse_json(json_bytes(path, limit=limit), printable(path), unique_keys=unique_keys)


def json_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a JSON file, unparsed. Raises InputError where it cannot be read, or is too large."""
    data = read_file(path, limit)
    reject_stand_in(path, data[:512])
    return data


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError as `read_json` does, and where the file holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_json(data: bytes, where: str, *, unique_keys: bool = False) -> Any:
    """The value that `data` is the JSON of; errors as for `read_json`, and they begin with `where`."""
    if len(data) > MAX_JSON_VALUES and data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_VALUES:
        raise InputError(f"{where}: more than {MAX_JSON_VALUES:,} values, more than any file of its kind")
    text = _decoded(data, where)
    try:
        found = json.loads(
            text,
            parse_constant=_constant,
            object_pairs_hook=_unique if unique_keys else None,
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {_complaint(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON that a model needs: nested too deep") from None
    except _ConstantError as error:
        position = next(m.start() for m in _STRING_OR_CONSTANT.finditer(text) if not m[0].startswith('"'))
        raise InputError(f"{where}: not JSON: {error} at {_place(text, position)}") from None
    except _TwiceError as error:
        raise InputError(f"{where}: the key {printable(error)} is there twice") from None
    except ValueError as error:  # an integer of thousands of digits (sys.set_int_max_str_digits)
        raise InputError(f"{where}: not JSON that a model needs: {error}") from None
    if (excess := _excess(found)) is not None:
        raise InputError(f"{where}: not JSON that a model needs: {excess}")
    return found


def _excess(value: Any) -> str | None:
    """What is too much in a value: its depth, or a number of which Python makes an infinity, which is no JSON."""
    level: list[Any] = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        children = list(chain.from_iterable(node.values() if type(node) is dict else node for node in level))
        kinds = set(map(type, children))  # of all at once, since a tokenizer holds 280 000 pairs of merges
        if float in kinds and any(type(child) is float and math.isinf(child) for child in children):
            return "a number beyond any float"
        if kinds.isdisjoint((dict, list)):
            return None
        level = [child for child in children if type(child) in (dict, list)]
    return "nested too deep"


class _ConstantError(Exception):
    """NaN or an infinity, which Python would take."""


class _TwiceError(Exception):
    """A key for the second time, of which Python would keep the last."""


def _constant(name: str) -> None:
    raise _ConstantError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _TwiceError(key)
            seen.add(key)
    return result


def _decoded(data: bytes, where: str) -> str:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            f"{where}: not JSON: starts with a byte order mark at line 1 column 1",
            hint="save it as UTF-8 without BOM",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        raise InputError(f"{where}: not JSON: invalid UTF-8 at {_place(before, len(before))}") from None


def _complaint(error: json.JSONDecodeError) -> str:
    """Python's words, but for the slip that is made most by hand, which they do not name before 3.13."""
    head = error.doc[: error.pos + 1].rstrip()
    # Up to 3.12 the position is that of the bracket (or of what ends the space before it), later that of the comma.
    rest = error.doc[error.pos :].lstrip(" \t\r\n,")
    before = head.rstrip("}]").rstrip()
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return f"trailing comma at {_place(error.doc, len(before) - 1)}"
    return f"{error.msg} at {_place(error.doc, error.pos)}"


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line} column {position - text.rfind(chr(10), 0, position)}"
