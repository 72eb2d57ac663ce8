"""From a table's names to parts and back, the same for every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from llava_convert.core.arrays import FP8
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import FROM_TORCH_NAMES, StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.model.adapter import Adapter, parse_adapter, split_tail, with_tail
from llava_convert.model.checkpoint import IMAGE_NEWLINE, LLM, PARTS, VISION, Dropped, Extra, Part
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.names import LayoutTable, lookup_errors
from llava_convert.model.target import Output
from llava_convert.model.training import LoraSettings

ADAPTER_DIALECTS = ("adapter", "lora")


@dataclass(frozen=True)
class Sorted:
    """A layout's tensors by part: whole ones, those under peft, and what is left behind.

    `paths` are the modules under peft as they are called on disk, by canonical name.
    """

    weights: Mapping[str, dict[str, StoredTensor]]
    adapters: Mapping[str, dict[str, StoredTensor]]
    image_newline: StoredTensor | None
    dropped: tuple[Dropped, ...]
    dialects: tuple[str, ...] = field(default=())
    extra: Extra | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    def part(
        self, name: str, settings: LoraSettings | None, where: str, paths: Mapping[str, str] | None = None
    ) -> tuple[Part, tuple[Dropped, ...]]:
        """The part as far as the tensors say, its adapter parsed. `paths` as for `parse_adapter`."""
        raw = self.adapters[name]
        if not raw:
            return Part(weights=self.weights[name]), ()
        adapter, left = parse_adapter(raw, settings, where, paths)
        dropped = tuple(Dropped(key, reason) for key, reason in left.items())
        if not adapter.modules:
            # Only whole tensors under peft's prefix: a part that was trained without LoRA after all.
            return Part(weights={**self.weights[name], **adapter.overrides}), dropped
        return Part(weights=self.weights[name], adapter=adapter), dropped


def sort_tensors(tensors: Mapping[str, StoredTensor], table: LayoutTable, where: Path) -> Sorted:
    """Give every tensor its canonical name and part. Those that no row takes are `extra`.

    Raises UnsupportedError (exit 4) where no row takes any, InputError when two mean the same tensor.
    """
    weights: dict[str, dict[str, StoredTensor]] = {part: {} for part in PARTS}
    adapters: dict[str, dict[str, StoredTensor]] = {part: {} for part in PARTS}
    unknown: dict[str, str] = {}
    dropped: list[Dropped] = []
    dialects: set[str] = set()
    meant: dict[str, str] = {}
    paths: dict[str, str] = {}
    newline = None
    for disk, tensor in tensors.items():
        reason = table.dropped(disk)
        if reason is not None:
            dropped.append(Dropped(disk, reason))
            continue
        bare, tail = split_tail(disk)
        named = table.read(bare)
        if named is None:
            unknown[disk] = disk
            continue
        part, canonical = named.canonical.partition(".")[0], with_tail(named.canonical, tail)
        if tail:
            paths[named.canonical.rpartition(".")[0]] = bare.rpartition(".")[0]
        reason = _buffer(part, canonical)
        if reason is not None:
            dropped.append(Dropped(disk, reason))
            continue
        if canonical in meant:
            raise InputError(f"{where}: {meant[canonical]} and {disk} are both {canonical}")
        meant[canonical] = disk
        dialects.add(named.dialect)
        if canonical == IMAGE_NEWLINE:
            newline = tensor
        elif named.dialect in ADAPTER_DIALECTS:
            adapters[part][canonical] = tensor
        else:
            weights[part][canonical] = tensor
    extra = Extra(tuple(unknown), lookup_errors(unknown, table)) if unknown else None
    if extra is not None and not meant:
        raise UnsupportedError(f"{where}: {extra.problem}", hint="--table FILE.toml adds names to those of a layout")
    return Sorted(weights, adapters, newline, tuple(dropped), tuple(sorted(dialects)), extra, paths)


def _buffer(part: str, canonical: str) -> str | None:
    """Why an old buffer is dropped, whatever family it is of."""
    for table in architectures().values():
        if table.part == part:
            reason = table.dropped(canonical)
            if reason is not None:
                return reason
    return None


def outputs(
    recipes: Mapping[str, Recipe],
    table: LayoutTable,
    dtype: str,
    *,
    prefix: str = "",
    skip: frozenset[str] = frozenset(),
) -> tuple[Output, ...]:
    """Name recipes as the layout writes them, in the layout's module order.

    `prefix` is the file set in the table's names (`root/`), which is not part of the name in the file.
    Tensors of a dtype that no arithmetic is done on keep it.
    """
    order = {name: i for i, name in enumerate(recipes)}
    found: list[tuple[tuple[int, int], Output]] = []
    for canonical, recipe in recipes.items():
        if canonical in skip:
            continue
        named = table.write(canonical)
        if named is None:
            raise UnsupportedError(f"the {table.name} layout has no name for {canonical}")
        disk, row = named
        found.append(((row, order[canonical]), Output(disk.removeprefix(prefix), canonical, recipe, dtype)))
    return tuple(output for _, output in sorted(found, key=lambda pair: pair[0]))


def adapter_outputs(adapter: Adapter, part: str, dtype: str) -> tuple[Output, ...]:
    """An adapter as peft saves it: `base_model.model.` and the name within the part."""
    return tuple(
        Output(f"base_model.model.{name.partition('.')[2]}", name, Recipe(tensor), dtype)
        for name, tensor in adapter.tensors.items()
    )


def llm_dtype(model: Model) -> str:
    """The dtype of most of the language model's bytes; of all bytes when it has none here.

    Of FP8 the one that its config says, which the model had before; else bfloat16, whose range holds any.
    """
    sizes: dict[str, int] = {}
    recipes = model.part(LLM) or model.part(VISION) or model.recipes
    for tensor in (member.tensor for recipe in recipes.values() for member in recipe.members):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    found = max(sizes, key=lambda dtype: (sizes[dtype], dtype)) if sizes else "F16"
    if found in FP8:
        return FROM_TORCH_NAMES.get(str(model.configs.get(LLM, {}).get("torch_dtype")), "BF16")
    return found
