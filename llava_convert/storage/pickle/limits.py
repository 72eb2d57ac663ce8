"""What a pickle may cost whoever reads it, in memory and in time.

A real LLaVA-8B with optimizer state needs about 35 opcodes a tensor (250,000 in all). The limits stand far above what
real files need, and keep a file that was made to be the worst to seconds and a bounded amount of memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from llava_convert.storage.pickle.globals import Inert

MAX_PICKLE_BYTES = 128 << 20  # a million iterations of HistoryBuffer come to about 100 MiB; anything else to less
MAX_OPCODES = 1_000_000  # each may make a container, which costs up to 220 bytes until the tree is checked
MAX_TEXT = 1 << 20  # a longer string (a HistoryBuffer's array) is replaced by `Elided`
MAX_TEXT_TOTAL = 64 << 20
MAX_COPIED = 1_000_000  # items copied by list(x), set(x) and the like, which repeat without new opcodes
MAX_SETS = 100_000  # a set is the largest object (216 bytes) that one opcode makes
MAX_BUILT = 100_000  # tensors, each of which costs up to 64 dimensions of arithmetic
MAX_KEY = 4096  # characters; equal keys that are not the same object are compared each time that they are set
# Hashes of numbers, and of tuples of them, are not salted, so collisions can be made: bound their cost.
MAX_NUMBER_KEYS = 20_000  # an optimizer's state has one for each parameter
MAX_TUPLE_KEYS = 20_000
MAX_GLOBALS = 10_000  # distinct ones; real files name about 15
# Picklers count their memo from 0 upwards; an index far above can be one of many that collide in a dict.
MEMO_GAP = 1000
MAX_MEMO_LEAPS = 100
MAX_INT_BYTES = 1024
MAX_NAME = 512
MAX_DEPTH = 200  # well inside the recursion limit of whoever walks the tree
MAX_TREE = 20_000_000  # nodes of the tree once every shared branch is counted each time that it is reached
_MAX_KEY_INT = 2**61 - 1  # from here on, ints have equal hashes at will

_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_WALKED = _CONTAINERS | {Inert}


class Malformed(Exception):
    """The pickle makes no sense here; `load` turns it into an InputError that names the file."""


class Hostile(Exception):
    """The pickle wants to run code or exhaust the machine; `load` turns it into an UnsafeError: "its pickle <what>"."""


class Costs:
    """What one pickle has cost so far; each method raises Hostile where it gets too much."""

    def __init__(self) -> None:
        self._text = self._copied = self._built = self._sets = 0
        self._tuple_keys = self._number_keys = self._memo_leaps = 0

    def text(self, count: int) -> None:
        self._text += count
        if self._text > MAX_TEXT_TOTAL:
            raise Hostile(f"holds more than {MAX_TEXT_TOTAL:,} bytes of text")

    def copied(self, count: int) -> None:
        self._copied += count
        if self._copied > MAX_COPIED:
            raise Hostile("builds huge objects from small ones")

    def built(self) -> None:
        self._built += 1
        if self._built > MAX_BUILT:
            raise Hostile(f"makes more than {MAX_BUILT:,} tensors")

    def set_made(self) -> None:
        self._sets += 1
        if self._sets > MAX_SETS:
            raise Hostile(f"holds more than {MAX_SETS:,} sets")

    def memo_leap(self) -> None:
        self._memo_leaps += 1
        if self._memo_leaps > MAX_MEMO_LEAPS:
            raise Hostile(f"numbers its memo with more than {MAX_MEMO_LEAPS} leaps")

    def keys(self, keys: Iterable[Any]) -> None:
        """Raise Malformed for keys that no dict or set takes here, Hostile for those that are made to be slow."""
        for key in keys:
            if type(key) is not str or len(key) > MAX_KEY:
                self._key(key)

    def _key(self, key: Any, depth: int = 0) -> None:
        kind = type(key)
        if kind in (bool, Inert) or key is None:
            return
        if kind in (str, bytes):
            if len(key) > MAX_KEY:
                raise Hostile(f"uses a text of {len(key):,} characters as a key")
        elif kind in (int, float):
            self._number_keys += 1
            if self._number_keys > MAX_NUMBER_KEYS:
                raise Hostile(f"uses more than {MAX_NUMBER_KEYS:,} numbers as keys")
            if kind is int and abs(key) >= _MAX_KEY_INT:
                raise Hostile("uses a huge number as a key")
        elif kind is tuple:
            self._tuple_keys += len(key) + 1
            if depth > 3 or len(key) > 64 or self._tuple_keys > MAX_TUPLE_KEYS:
                raise Hostile("uses deep, long or too many tuples as keys")
            for part in key:
                self._key(part, depth + 1)
        else:
            raise Malformed(f"a key of type {kind.__name__}")


def check_tree(root: Any) -> None:
    """Raise Hostile unless dicts, lists, tuples and sets are acyclic, shallow and of bounded unshared size.

    Each Inert is a leaf, and what it holds is checked as trees of their own (a graph of objects may be cyclic).
    """
    sizes: dict[int, int] = {}
    heights: dict[int, int] = {}
    seen: set[int] = set()
    roots = [root]
    path: list[tuple[Any, list[Any]]] = []  # from a root down: each container, and its children still to be visited
    on_path: set[int] = set()
    while path or roots:
        node, ahead = path[-1] if path else (None, roots)
        if not ahead:
            path.pop()
            on_path.discard(id(node))
            children = _children(node)
            size = 1 + len(children) + sum(sizes.get(id(child), 0) for child in children)
            height = 1 + max((heights.get(id(child), 0) for child in children), default=0)
            if height > MAX_DEPTH:
                raise Hostile(f"nests containers more than {MAX_DEPTH} deep")
            if size > MAX_TREE:
                raise Hostile(f"unfolds to more than {MAX_TREE:,} objects")
            sizes[id(node)], heights[id(node)] = size, height
            continue
        child = ahead.pop()
        if type(child) is Inert:
            if id(child) not in seen:
                seen.add(id(child))
                roots += [child.args, child.state, child.items, child.mapping]
        elif type(child) in _CONTAINERS:
            if id(child) in on_path:
                raise Hostile("holds a container that holds itself")
            if id(child) not in sizes:
                if len(path) >= MAX_DEPTH:
                    raise Hostile(f"nests containers more than {MAX_DEPTH} deep")
                path.append((child, [inner for inner in _children(child) if type(inner) in _WALKED]))
                on_path.add(id(child))


def _children(container: Any) -> Collection[Any]:
    return container.values() if type(container) is dict else container
