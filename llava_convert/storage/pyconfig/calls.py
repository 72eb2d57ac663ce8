"""The calls that a statically read config may make: text formatting, methods of builtin values, a few functions.

Each computes with builtin values only and bounds what it makes; a call of anything else is kept as a `Call`.
"""

from __future__ import annotations

import copy
import math
import posixpath
import re
import string
from collections.abc import Callable
from typing import Any

from llava_convert.core.errors import UnsafeError
from llava_convert.storage.pyconfig.values import (
    MAX_CHARS,
    MAX_ITEMS,
    PLAIN_HINT,
    Call,
    NotKnown,
    attribute,
    bounded,
    is_key,
    is_number,
    items,
    key,
    known,
    mapping,
)

# A width or a precision of at most three digits: '{:>1000000000}' is a request for a gigabyte.
_SPEC = re.compile(r"(.?[<>=^])?[-+ ]?#?0?\d{0,3}[,_]?(\.\d{1,3})?[a-zA-Z%]?", re.DOTALL)


def render(value: Any, conversion: int, spec: Any) -> str:
    """One field of an f-string or of str.format; scalars only, since nested text can grow exponentially."""
    if not is_key(known(value)) or isinstance(value, tuple) or not _SPEC.fullmatch(known(spec)):
        raise NotKnown("formatted text")
    if conversion in (ord("r"), ord("a")):
        value = repr(value) if conversion == ord("r") else ascii(value)
    return format(str(value) if conversion == ord("s") else value, spec)


def joined(separator: str, parts: list[Any], where: str) -> str:
    if not all(isinstance(known(part), str) for part in parts):
        raise NotKnown("text joined from what is not text")
    bounded(sum(map(len, parts)) + len(separator) * len(parts), MAX_CHARS, where)
    return separator.join(parts)


def _formatted(template: str, args: list[Any], kwargs: dict[str, Any], where: str) -> str:
    parts: list[str] = []
    automatic = 0
    for literal, field, spec, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        if not field:
            field, automatic = str(automatic), automatic + 1
        value = args[int(field)] if field.isdecimal() and len(field) < 5 else kwargs[field]
        parts.append(render(value, ord(conversion) if conversion else -1, spec or ""))
    return joined("", parts, where)


_STR_METHODS = """capitalize count endswith format join lower lstrip partition removeprefix removesuffix replace
rpartition rsplit rstrip split splitlines startswith strip title upper"""

METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "pop", "setdefault", "update", "values"}),
    list: frozenset({"append", "copy", "extend", "insert", "pop"}),
    tuple: frozenset(),
}


def method(owner: Any, name: str, args: list[Any], kwargs: dict[str, Any], where: str) -> Any:
    """`owner.name(...)` of a builtin value. UnsafeError when the result would be huge."""
    if name not in METHODS[type(owner)]:
        attribute(owner, name, where)  # refuses the interpreter's insides
        raise NotKnown(f"method {name} of a {type(owner).__name__}")
    if isinstance(owner, str):
        if name == "format":
            return _formatted(owner, args, kwargs, where)
        if name == "join":
            return joined(owner, items(*args), where)
        if name == "replace" and len(args) >= 2:
            bounded(len(owner) + (owner.count(known(args[0])) * len(known(args[1]))), MAX_CHARS, where)
        result = getattr(owner, name)(*map(known, args), **kwargs)
    elif isinstance(owner, dict):
        if name == "update":
            more = {**(mapping(args[0]) if args else {}), **kwargs}
            bounded(len(owner) + len(more), MAX_ITEMS, where)
            return owner.update(more)
        result = getattr(owner, name)(*(key(arg) if i == 0 else arg for i, arg in enumerate(args)), **kwargs)
        result = list(result) if name in ("keys", "values", "items") else result
    else:
        bounded(len(owner) + 1, MAX_ITEMS, where)
        if name == "extend":
            args = [items(*args)]
            bounded(len(owner) + len(args[0]), MAX_ITEMS, where)
        if name in ("insert", "pop"):
            args[:1] = map(known, args[:1])
        result = getattr(owner, name)(*args, **kwargs)
    return result


def _numbers(values: list[Any]) -> list[Any]:
    values = items(values[0]) if len(values) == 1 else values
    if not all(is_number(known(value)) for value in values):
        raise NotKnown("a choice among values that are not numbers")
    return values


def _scalar(value: Any) -> Any:
    if is_number(known(value)) or (isinstance(value, str) and len(value) <= 400):
        return value
    raise NotKnown("a number from what is not one")


def _number(value: Any) -> Any:
    if not is_number(known(value)):
        raise NotKnown("arithmetic on what is not a number")
    return value


def _digits(value: Any) -> int:
    if isinstance(known(value), int) and abs(value) <= 100:  # round(1, -10**9) computes 10**10**9
        return int(value)
    raise NotKnown("rounding to an unusual number of digits")


def _range(*bounds: Any) -> list[int]:
    numbers = range(*map(known, bounds))
    bounded(len(numbers), MAX_ITEMS, "range")
    return list(numbers)


def _texts(*parts: Any) -> list[str]:
    if not all(isinstance(known(part), str) for part in parts):
        raise NotKnown("a path of what is not text")
    return list(parts)


def _sorted(value: Any) -> list[Any]:
    parts = items(value)
    return sorted(_texts(*parts) if parts and isinstance(parts[0], str) else _numbers([parts]))


def _dict(*pairs: Any, **named: Any) -> dict[Any, Any]:
    return {**(mapping(pairs[0]) if pairs else {}), **named}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.dict": _dict,
    "mmengine.ConfigDict": _dict,
    "mmengine.config.ConfigDict": _dict,
    "builtins.list": lambda *value: items(value[0]) if value else [],
    "builtins.tuple": lambda *value: tuple(items(value[0])) if value else (),
    "builtins.set": lambda *value: set(map(key, items(value[0]))) if value else set(),
    "builtins.int": lambda value: int(_scalar(value)),
    "builtins.float": lambda value: float(_scalar(value)),
    "builtins.str": lambda value: render(value, ord("s"), ""),
    "builtins.bool": lambda value: bool(known(value)),
    "builtins.len": lambda value: len(known(value)),
    "builtins.abs": lambda value: abs(_number(value)),
    "builtins.min": lambda *values: min(_numbers(list(values))),
    "builtins.max": lambda *values: max(_numbers(list(values))),
    "builtins.sum": lambda values: sum(_numbers([values])),
    "builtins.round": lambda value, *digits: round(_number(value), *map(_digits, digits)),
    "builtins.range": _range,
    "builtins.sorted": _sorted,
    "os.path.join": lambda *parts: posixpath.join(*_texts(*parts)),
    "os.path.basename": lambda path: posixpath.basename(*_texts(path)),
    "os.path.dirname": lambda path: posixpath.dirname(*_texts(path)),
    "os.path.normpath": lambda path: posixpath.normpath(*_texts(path)),
    "math.sqrt": lambda value: math.sqrt(_number(value)),
    "math.ceil": lambda value: math.ceil(_number(value)),
    "math.floor": lambda value: math.floor(_number(value)),
    "copy.copy": lambda value: copy.copy(known(value)),
}

# Not executed any more than the rest; refused, since a config that does this is not a config. Reading files or the
# environment is left opaque: honest configs do it.
_REFUSED = re.compile(
    r"builtins\.(eval|exec|compile|__import__|breakpoint)|(subprocess|ctypes|runpy|pickle|marshal|socket|pty)\..*"
    r"|(os|posix|nt)\.(system|popen|exec.*|spawn.*|posix_spawn.*|fork.*|kill.*|remove.*|unlink|rmdir|chmod|rename.*)"
    r"|shutil\.rmtree|importlib\.import_module"
)


def call(name: str, args: list[Any], kwargs: dict[str, Any], where: str) -> Any:
    """The call of `name`: computed where it is one of FUNCTIONS, otherwise a `Call`; UnsafeError for code that runs."""
    if _REFUSED.fullmatch(name):
        raise UnsafeError(f"{where}: the config calls {name}; it was not run", hint=PLAIN_HINT)
    if name in FUNCTIONS:
        return FUNCTIONS[name](*args, **kwargs)
    return Call(name, tuple(args), kwargs, where)
