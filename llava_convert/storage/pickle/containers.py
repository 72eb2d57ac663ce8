"""Dicts, lists, tuples and sets as a pickle builds them: filled, and made by calling their types.

Every key is checked before it is hashed, every copy counted before it is made.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llava_convert.core.tensors import StoredTensor
from llava_convert.storage.pickle.globals import Inert
from llava_convert.storage.pickle.limits import Costs, Malformed

# The only types that are called. int(), str(), bytes(), range() and so on stay Inert: nothing that is read needs their
# value, and they are how a short pickle asks for much memory.
MADE = frozenset({
    "collections.OrderedDict", "collections.defaultdict", "torch.Size", "builtins.dict", "builtins.list",
    "builtins.tuple", "builtins.set", "builtins.frozenset",
})  # fmt: skip


def make(name: str, args: tuple[Any, ...], costs: Costs) -> Any:
    """What calling one of `MADE` gives; an Inert where the argument is no plain container."""
    if name == "collections.defaultdict":
        args = args[1:]
    items: Any = args[0] if args else ()
    if len(args) > 1 or type(items) not in (list, tuple, set, frozenset, dict):
        return Inert(name, args)
    costs.copied(len(items))
    if name == "torch.Size":
        if len(items) > 64 or not all(type(size) is int for size in items):
            raise Malformed("a torch.Size that holds no sizes")
        return tuple(items)
    if name in ("builtins.set", "builtins.frozenset"):
        made = make_set(items, costs)
        return made if name == "builtins.set" else frozenset(made)
    if name in ("builtins.list", "builtins.tuple"):
        return list(items) if name == "builtins.list" else tuple(items)
    made_dict: dict[Any, Any] = {}
    for pair in items.items() if type(items) is dict else items:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise Malformed("a dict made from something that is no pair")
        set_items(made_dict, pair, costs)
    return made_dict


def make_set(items: Collection[Any], costs: Costs) -> set[Any]:
    costs.set_made()
    costs.keys(items)
    return set(items)


def set_items(target: Any, flat: list[Any] | tuple[Any, ...], costs: Costs) -> None:
    """`target[key] = value` for `flat`, which holds keys and values in turn; a tensor takes its key as its name."""
    if type(target) is Inert:
        if target.mapping is None:
            target.mapping = {}
        target = target.mapping
    elif type(target) is not dict:
        raise Malformed(f"items set on {type(target).__name__}")
    if len(flat) % 2:
        raise Malformed("a key without a value")
    keys = flat[::2]
    costs.keys(keys)
    for key, value in zip(keys, flat[1::2], strict=True):
        target[key] = value.renamed(key) if type(value) is StoredTensor and type(key) is str else value


def append_items(target: Any, items: list[Any], costs: Costs) -> None:
    if type(target) is list:
        target += items
    elif type(target) is set:
        costs.keys(items)
        target.update(items)
    elif type(target) is Inert:
        if target.items is None:
            target.items = []
        target.items += items
    else:
        raise Malformed(f"items appended to {type(target).__name__}")
