"""Types of the keys of configs, as data (`[types]` of `mappings/facts/*.toml`), and the check of a file against them.

A key has one type wherever it stands, in nested objects too. What no table types is not looked at. The bounds are those
of the formats that values go to: 32 bits for whole numbers, float32 for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.core.text import printable
from llava_convert.model.tables.facts import fact_tables
from llava_convert.model.tables.patterns import TableError
from llava_convert.storage.sidecars import Sidecars

_LARGEST = 3.4028234663852886e38  # float32's


def _whole(value: Any) -> bool:
    return type(value) is int and -(2**31) <= value < 2**31


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


def _token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _list_of(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(sound, value))


def _size(value: Any) -> bool:
    return _count(value) or (isinstance(value, dict) and bool(value) and all(map(_count, value.values())))


def _sizes(value: Any) -> bool:
    return _text(value) or _list_of(_list_of(_count))(value)


def _named_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _special_token(value: Any) -> bool:
    return _text(value.get("content") if isinstance(value, dict) else value)


# Each with what a message says was expected.
TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "whole": (_whole, "a whole number of 32 bits"),
    "layer": (lambda value: _whole(value) or _list_of(_whole)(value), "the number of a layer"),
    "count": (_count, "a count, a whole number from 0 below 2^32"),
    "number": (_number, "a number that float32 holds"),
    "positive": (lambda value: _number(value) and value > 0, "a number above 0 that float32 holds"),
    "text": (_text, "a text"),
    "flag": (_flag, "true or false"),
    "object": (lambda value: isinstance(value, dict), "an object"),
    "token": (_token, "the id of a token"),
    # Configs of the first Llamas say -1 for none.
    "token or -1": (lambda value: _token(value) or (type(value) is int and value == -1), "the id of a token, or -1"),
    "tokens": (lambda value: _token(value) or _list_of(_token)(value), "the id of a token, or a list of such ids"),
    "special token": (_special_token, "the text of a token, or an object with its content"),
    "texts": (_list_of(_text), "a list of texts"),
    "numbers": (_list_of(_number), "a list of numbers that float32 holds"),
    "colour": (lambda value: _list_of(_number)(value) and len(value) == 3, "three numbers, of red, green and blue"),
    "size": (_size, "a count, or an object of counts"),
    "sizes": (_sizes, "a list of pairs of counts"),
    "names": (lambda value: _text(value) or _list_of(_text)(value), "a text or a list of texts"),
    "named numbers": (_named_numbers, "an object with a number for each name"),
}


@cache
def key_types(file: str) -> Mapping[str, str]:
    """The type of every typed key of a file of this name, from all tables about it.

    Raises TableError where two tables differ, or a type is not one of `TYPES`.
    """
    found: dict[str, str] = {}
    for name, raw in fact_tables().items():
        for kind, keys in raw.get("types", {}).items() if file in raw.get("typed", ()) else ():
            for key in keys:
                if kind not in TYPES or found.setdefault(key, kind) != kind:
                    raise TableError(f"{name}.toml: {key} is of type {kind!r}, elsewhere {found.get(key)!r}")
    return found


@cache
def _filled(file: str) -> frozenset[str]:
    """The keys of a file that are never null."""
    tables = (raw for raw in fact_tables().values() if file in raw.get("typed", ()))
    return frozenset(key for raw in tables for key in raw.get("filled", ()))


def check_types(config: Mapping[str, Any], file: str, where: str) -> None:
    """Raise InputError (exit 3) for a value of another type than its key has, naming file (`where`), key and value.

    null says nothing, but where a table says that the key is always `filled`.
    """
    if types := key_types(file):  # none for tokenizer.json, which has 128,000 keys
        _check(config, types, _filled(file), where, ())


def _check(
    config: Mapping[str, Any], types: Mapping[str, str], filled: frozenset[str], where: str, path: Iterable[str]
) -> None:
    for key, value in config.items():
        name = (*path, key)
        kind = types.get(key)
        if value is None and key not in filled:
            continue
        if kind is not None and not TYPES[kind][0](value):
            raise InputError(
                f"{where}: {printable('.'.join(name))} should be {TYPES[kind][1]}, found {_shown(value)}",
                hint="get the file that the model was published or trained with, or put the right value into it",
            )
        if isinstance(value, dict):
            _check(value, types, filled, where, name)


def _shown(value: Any) -> str:
    text = "null" if value is None else printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(files: Sidecars, name: str) -> dict[str, Any]:
    """The object in a config file, its values checked against the types of the file's keys.

    Raises InputError (exit 3) where the file is not a JSON object, or a value is of another type than its key has.
    """
    found = files.read_object(name)
    check_types(found, name, str(files.place(name)))
    return found
