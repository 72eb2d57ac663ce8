"""How other programs quantise weights, as data (`mappings/quantization.toml`): known by config and by tensors."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from llava_convert.core.resources import data_dir
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.model.tables.patterns import TableError, of_one_layer

# Keys of config.json that hold what was done: transformers' own, an older one of compressed-tensors, MLX's.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_HALVES = ("text_config", "llm_config", "vision_config")
_KEYS = frozenset({"name", "methods", "config", "files", "bits", "tensors", "scales", "idle"})


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `scales` and `idle` are those of a method whose weights can be made floats of."""

    name: str
    methods: tuple[str, ...]
    config: tuple[str, ...]
    files: tuple[str, ...]
    bits: tuple[str | int, ...]
    tensors: tuple[str, ...]
    scales: tuple[str, ...]
    idle: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """What was found: the method, how many bits where that is said, and the config that says so."""

    method: Method
    bits: int | None
    config: Mapping[str, Any]

    def __str__(self) -> str:
        words = [self.method.name, self.config.get("format"), None if self.bits is None else f"{self.bits} bits"]
        return ", ".join(printable(word) for word in words if word)


@cache
def methods() -> tuple[Method, ...]:
    """The rows of the table. Raises TableError for two that one config would fit."""
    raw = tomllib.loads((data_dir("mappings") / "quantization.toml").read_text(encoding="utf-8"))["method"]
    found: list[Method] = []
    for row in raw:
        if row.keys() - _KEYS:
            raise TableError(f"quantization.toml: {row['name']} has keys that mean nothing")
        lists = {key: tuple(row.get(key, ())) for key in _KEYS - {"name"}}
        found.append(Method(row["name"], **lists))
    named = [name for method in found for name in method.methods]
    if len(named) != len(set(named)):
        raise TableError("quantization.toml: a quant_method is listed twice")
    return tuple(found)


def files() -> tuple[str, ...]:
    """The files beside config.json in which older programs say what they did."""
    return tuple(name for method in methods() for name in method.files)


def quantization(
    config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], names: Iterable[str]
) -> Quantization | None:
    """How the model of a config, with these files `beside` it and tensors of these names, is quantised; None: not.

    What the config says comes first, then the files, then the names.
    """
    said = next(_said(config), None)
    if said is not None:
        word = str(said.get("quant_method") or "").lower()
        by_name = next((method for method in methods() if word and word in method.methods), None)
        by_key = next((method for method in methods() if any(key in said for key in method.config)), None)
        method = by_name or (by_key if not word else None) or Method(word or "unknown", *((),) * 7)
        return Quantization(method, _bits(method, said), said)
    for method in methods():
        told = next((beside[name] for name in method.files if name in beside), None)
        if told is not None:
            return Quantization(method, _bits(method, told), told)
    every = of_one_layer(names)
    for method in methods():
        if any(fnmatchcase(name, pattern) for pattern in method.tensors for name in every):
            return Quantization(method, _bits(method, {}), {})
    return None


def _said(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    halves = (config.get(half) for half in _HALVES)
    for part in (config, *(half for half in halves if isinstance(half, Mapping))):
        for key in CONFIG_KEYS:
            if isinstance(found := part.get(key), Mapping) and found:
                yield found


def _bits(method: Method, said: Mapping[str, Any]) -> int | None:
    for bits in method.bits:
        if isinstance(bits, int):
            return bits
        key, _, meant = bits.partition("=")
        value = _deep(said, key)
        if meant and value is True:
            return int(meant)
        text = str(value).removeprefix("int").removeprefix("float")
        if not meant and type(value) is not bool and text.isdecimal() and len(text) < 3:
            return int(text)
    return None


def _deep(value: Any, key: str) -> Any:
    """The first value of a key, however deep: compressed-tensors says its bits in groups."""
    if not isinstance(value, Mapping):
        return None
    if key in value:
        return value[key]
    return next((found for inner in value.values() if (found := _deep(inner, key)) is not None), None)
