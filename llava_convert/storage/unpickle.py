"""Reads a pickle as data: nothing that a pickle names is imported, looked up or called.

This is a stack machine of its own, not a subclass of `pickle.Unpickler`, for two reasons. The C unpickler sizes its
memo by the largest index that it is told (`LONG_BINPUT 0x7fffffff` takes 16 GiB) and calls whatever `find_class` gives
it; here the only things ever called are the closed tables below, so that safety does not rest on a list of names.
The list of forbidden names exists to *say* that a file is hostile, instead of quietly reading past it.

Opcodes and their meaning: CPython's `Lib/pickletools.py`. What real checkpoints hold: mmengine's HistoryBuffer pickles
its statistics as `getattr(HistoryBuffer, "min")`, numpy scalars, ConfigDict, DeepSpeed's LossScaler and enums.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_convert.errors import InputError, UnsafeError
from llava_convert.spec import StoredTensor

# Bounds. A real LLaVA-8B with optimizer state needs about 35 opcodes a tensor (250,000 in all); 4 million opcodes
# bound the machine's own objects to about half a GiB and a few seconds, on a file made to be the worst.
MAX_PICKLE_BYTES = 128 << 20  # a million iterations of HistoryBuffer come to about 100 MiB; anything else to less
MAX_OPCODES = 4_000_000
MAX_TEXT = 1 << 20  # a longer string (a HistoryBuffer's array) is replaced by `Elided`
MAX_TEXT_TOTAL = 64 << 20
MAX_COPIED = 4_000_000  # items copied by list(x), set(x) and the like, which repeat without new opcodes
MAX_SETS = 100_000  # a set is the largest object (216 bytes) that one opcode makes
MAX_BUILT = 300_000  # tensors, each of which costs up to 64 dimensions of arithmetic
MAX_TUPLE_KEYS = 20_000  # hashes of tuples of ints are not salted, so collisions can be made: bound their cost
MAX_INT_BYTES = 1024
MAX_NAME = 512
MAX_DEPTH = 200  # well inside the recursion limit of whoever walks the tree
MAX_TREE = 20_000_000  # nodes of the tree once every shared branch is counted each time that it is reached
_MAX_KEY_INT = 2**61 - 1  # from here on, hashes of ints collide at will

# The module wherever it stands in a dotted name: `torch.serialization.os`, `collections.abc.sys`, `asyncio.subprocess`.
_FORBIDDEN_PARTS = frozenset({
    "os", "posix", "nt", "subprocess", "sys", "socket", "shutil", "importlib", "runpy", "pickle", "ctypes",
    "builtins", "__builtin__",
})  # fmt: skip
# The same modules under their other names (numpy.random._pickle is harmless and real, hence roots only).
_FORBIDDEN_ROOTS = frozenset({
    "_pickle", "cPickle", "_compat_pickle", "_posixsubprocess", "_winapi", "_socket", "_ctypes", "_imp", "imp",
    "_frozen_importlib", "_frozen_importlib_external", "zipimport", "pkgutil", "pty", "commands", "popen2", "marshal",
})  # fmt: skip
_FORBIDDEN_BUILTINS = frozenset({
    "eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "raw_input", "breakpoint",
    "globals", "locals", "vars", "setattr", "delattr", "apply", "reload", "help", "exit", "quit",
})  # fmt: skip
_FORBIDDEN_NAMES = frozenset({"io.open", "io.open_code", "io.FileIO", "_io.open", "_io.open_code", "_io.FileIO"})
# Double-underscore names are the road from any object to the interpreter; these are the ones that files really hold.
_PLAIN_DUNDERS = frozenset(["__main__", "__mp_main__", "__newobj__", "__newobj_ex__", "__torch__"])
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2 names, which protocol 2 still writes
_OLD_BUILTINS = {"xrange": "range", "long": "int", "unicode": "str"}
_GETATTR = "builtins.getattr"
_QUIET_BUILTINS = frozenset(
    f"builtins.{kind.__name__}"
    for kind in (
        set, frozenset, list, dict, tuple, int, float, str, bytes, bytearray, complex, slice, range, bool, object,
    )
)  # fmt: skip


class Malformed(Exception):
    """The pickle makes no sense here; `load` turns it into an InputError that names the file."""


class PickleEnds(InputError):
    """The data end inside the pickle."""


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """A global that a pickle names, or what calling it would have made; it does nothing.

    `args` is None for the global itself, else what it was called with. `state` is what `__setstate__` would have
    got, `items` what was appended, `mapping` what was set by key. They may form cycles: do not walk them recursively.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] | None = None
    mapping: dict[Any, Any] | None = None

    def __repr__(self) -> str:  # never the contents: they are untrusted, unbounded and may be cyclic
        return f"<Inert {shown(self.name)}{'' if self.args is None else ' instance'}>"


@dataclass(frozen=True, slots=True)
class Elided:
    """Stands for a text or bytes of `nbytes` which was not kept, being longer than MAX_TEXT."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """`root` is the tree, `stubs` the sorted names of the globals that became inert, `end` the offset after STOP."""

    root: Any
    stubs: tuple[str, ...]
    end: int


Persistent = Callable[[Any], Any]
Builder = Callable[[tuple[Any, ...]], Any]


def shown(text: str) -> str:
    """`text` fit for a message: one line, printable, at most 120 characters."""
    short = text if len(text) <= 120 else text[:117] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]


def load(
    data: bytes,
    *,
    path: Path,
    start: int = 0,
    persistent: Persistent | None = None,
    builders: Mapping[str, Builder] | None = None,
    quiet: Callable[[str], bool] = lambda name: False,
) -> Loaded:
    """The tree of the pickle at `start` of `data`; `path` is for messages.

    The tree holds dict, list, tuple, set, frozenset, str, bytes, int, float, bool, None, `Elided`, `Inert` and what
    `persistent` (given a persistent id) and `builders` (dotted name -> function of the arguments) return. Those two
    are the caller's own code, and raise Malformed where their arguments are wrong. A StoredTensor set under a str key
    takes it as its name. Globals for which `quiet` holds are not listed in `stubs`.

    Raises PickleEnds when data end early, InputError when they are no pickle, UnsafeError when the pickle names
    something that runs code or would exhaust the machine (rows 35 and 36 of the fault list).
    """
    if len(data) - start > MAX_PICKLE_BYTES:
        raise UnsafeError(f"{path}: its pickle has {len(data) - start:,} bytes; {MAX_PICKLE_BYTES:,} are the most read")
    machine = _Machine(data, path, persistent, builders or {}, quiet)
    root = machine.run(start)
    try:
        check_tree(root)
    except Malformed as error:
        raise UnsafeError(f"{path}: {error}") from None
    return Loaded(root, tuple(sorted(machine.stubs)), machine.pos)


def forbidden(module: str, name: str) -> bool:
    """Whether a global runs code or reaches what does (row 35). `getattr` of builtins is judged at its call."""
    full = f"{module}.{name}"
    parts = full.split(".")
    if parts[0] == "builtins":
        parts = parts[1:]
        if parts[0] in _FORBIDDEN_BUILTINS or (parts[0] == "getattr" and len(parts) > 1):
            return True
    elif "getattr" in parts or parts[0] in _FORBIDDEN_ROOTS or full in _FORBIDDEN_NAMES:
        return True
    if not _FORBIDDEN_PARTS.isdisjoint(parts):
        return True
    return any(
        len(part) > 4 and part.startswith("__") and part.endswith("__") and part not in _PLAIN_DUNDERS for part in parts
    )


def _is_config_dict(name: str) -> bool:
    return name.startswith(("mmengine.", "mmcv.")) and name.endswith(".ConfigDict")


_WALKED = frozenset({dict, list, tuple, set, frozenset, Inert})


def check_tree(root: Any) -> None:
    """Raise Malformed unless dicts, lists, tuples and sets are acyclic, shallow and of bounded unshared size.

    Each Inert is a leaf, and what it holds is checked as trees of their own (a graph of objects may be cyclic).
    """
    sizes: dict[int, int] = {}
    heights: dict[int, int] = {}
    active: set[int] = set()
    seen: set[int] = set()
    work: list[tuple[Any, bool]] = [(root, False)]
    roots: list[Any] = []
    while work or roots:
        if not work:
            work.append((roots.pop(), False))
        node, leaving = work.pop()
        kind = type(node)
        if kind is dict:
            children = node.values()
        elif kind in (list, tuple, set, frozenset):
            children = node
        else:
            if kind is Inert and id(node) not in seen:
                seen.add(id(node))
                roots += [node.args, node.state, node.items, node.mapping]
            continue
        key = id(node)
        if leaving:
            size = 1 + len(children) + sum(sizes.get(id(child), 0) for child in children)
            height = 1 + max((heights.get(id(child), 0) for child in children), default=0)
            if height > MAX_DEPTH:
                raise Malformed(f"its pickle nests containers more than {MAX_DEPTH} deep")
            if size > MAX_TREE:
                raise Malformed(f"its pickle unfolds to more than {MAX_TREE:,} objects")
            sizes[key], heights[key] = size, height
            active.discard(key)
        elif key in active:
            raise Malformed("its pickle holds a container that holds itself")
        elif key not in sizes:
            if len(active) >= MAX_DEPTH:
                raise Malformed(f"its pickle nests containers more than {MAX_DEPTH} deep")
            active.add(key)
            work.append((node, True))
            work += [(child, False) for child in children if type(child) in _WALKED]


class _Machine:
    """One run over one pickle; `_HANDLERS` below says which method serves which opcode."""

    def __init__(
        self,
        data: bytes,
        path: Path,
        persistent: Persistent | None,
        builders: Mapping[str, Builder],
        quiet: Callable[[str], bool],
    ) -> None:
        self.data, self.path, self.persistent, self.quiet = data, path, persistent, quiet
        self.builders = builders
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Inert] = {}
        self.stubs: set[str] = set()
        self.getattr = Inert(_GETATTR)
        self.loose_getattrs = 0  # pushed and not (yet) called with HistoryBuffer
        self.text_total = self.copied = self.built = self.sets = self.tuple_keys = 0

    def run(self, start: int) -> Any:
        data, handlers = self.data, _HANDLERS
        self.pos = start
        try:
            for _ in range(MAX_OPCODES):
                opcode = data[self.pos]
                self.pos += 1
                if opcode == 0x2E:  # STOP
                    root = self.stack.pop()
                    if self.loose_getattrs:
                        raise self.unsafe("uses builtins.getattr other than on mmengine's HistoryBuffer")
                    return root
                handlers[opcode](self)
        except Malformed as error:
            raise InputError(f"{self.path}: damaged pickle at byte {self.pos}: {error}") from None
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error):
            # Stack underflow, unknown memo keys, wrong types, bad UTF-8: what a damaged pickle does to a machine.
            if self.pos >= len(data):
                raise self.ends() from None
            raise InputError(f"{self.path}: damaged pickle at byte {self.pos}") from None
        raise self.unsafe(f"has more than {MAX_OPCODES:,} operations")

    def unsafe(self, what: str) -> UnsafeError:
        return UnsafeError(
            f"{self.path}: refused, its pickle {what}. Nothing of it was run.",
            hint="A checkpoint needs none of this: do not load the file elsewhere, and get it from its maker again.",
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def ends(self) -> PickleEnds:
        return PickleEnds(f"{self.path}: its pickle ends early: the file is truncated or damaged")

    def take(self, count: int) -> bytes:
        chunk = self.data[self.pos : self.pos + count]
        if len(chunk) < count:
            raise self.ends()
        self.pos += count
        return chunk

    def number(self, size: int) -> int:
        end = self.pos + size
        if end > len(self.data):
            raise self.ends()
        value = int.from_bytes(self.data[self.pos : end], "little")
        self.pos = end
        return value

    def line(self, limit: int = MAX_NAME) -> bytes:
        end = self.data.find(b"\n", self.pos, self.pos + limit + 1)
        if end < 0:
            if self.pos + limit < len(self.data):
                raise Malformed(f"a line of more than {limit} bytes")
            raise self.ends()
        chunk = self.data[self.pos : end]
        self.pos = end + 1
        return chunk

    def count_text(self, count: int) -> None:
        self.text_total += count
        if self.text_total > MAX_TEXT_TOTAL:
            raise self.unsafe(f"holds more than {MAX_TEXT_TOTAL:,} bytes of text")

    def payload(self, count: int) -> bytes | None:
        """The next `count` bytes, or None where they are too many to keep."""
        if count <= MAX_TEXT:
            self.count_text(count)
            return self.take(count)
        if count > len(self.data) - self.pos:
            raise self.ends()
        self.pos += count
        return None

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # -- globals and calls -----------------------------------------------------------------------------------------

    def push_global(self, module: Any, name: Any) -> None:
        found = self.globals.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            found = self.resolve(module, name)
            self.globals[module, name] = found
        if found is self.getattr:
            self.loose_getattrs += 1
        self.stack.append(found)

    def resolve(self, module: Any, name: Any) -> Inert:
        if type(module) is not str or type(name) is not str or not module or not name:
            raise Malformed("a global without a name")
        if len(module) + len(name) > MAX_NAME:
            raise self.unsafe(f"names a global of {len(module) + len(name)} characters")
        module = _OLD_MODULES.get(module, module)
        if module == "builtins":
            name = _OLD_BUILTINS.get(name, name)
        full = f"{module}.{name}"
        if forbidden(module, name):
            raise self.unsafe(f"names {shown(full)}, which can run code")
        if full == _GETATTR:
            return self.getattr
        known = full in _QUIET_BUILTINS or full in _CONTAINERS or full in self.builders
        if not known and not self.quiet(full):
            self.stubs.add(full)
        return Inert(full)

    def call(self, function: Any, args: Any) -> Any:
        """What stands for `function(*args)`: our own container or tensor, else an Inert."""
        if type(function) is not Inert or type(args) is not tuple:
            raise Malformed("a call of something that is no global")
        if function is self.getattr:
            raise self.unsafe("uses builtins.getattr other than on mmengine's HistoryBuffer")
        if function.args is not None:
            return Inert(function.name, args)
        if function.name in _CONTAINERS:
            return self.make_container(function.name, args)
        builder = self.builders.get(function.name)
        if builder is not None:
            self.built += 1
            if self.built > MAX_BUILT:
                raise self.unsafe(f"makes more than {MAX_BUILT:,} tensors")
            return builder(args)
        if _is_config_dict(function.name) and len(args) <= 1 and all(type(arg) is dict for arg in args):
            return args[0] if args else {}  # its pickle is ConfigDict(plain dict)
        return Inert(function.name, args)

    def call_getattr(self, args: Any) -> Inert:
        if type(args) is tuple and len(args) == 2 and type(args[0]) is Inert and type(args[1]) is str:
            owner = args[0]
            real = owner.name.startswith("mmengine.") and owner.name.endswith(".HistoryBuffer")
            if real and owner.args is None and args[1].isidentifier():
                self.loose_getattrs -= 1
                return Inert(f"{owner.name}.{args[1][:100]}")
        raise self.unsafe("uses builtins.getattr other than on mmengine's HistoryBuffer")

    # -- containers ------------------------------------------------------------------------------------------------

    def copied_items(self, args: tuple[Any, ...]) -> Any:
        """The plain container that is the only argument, () without one; None where it is something else."""
        if not args:
            return ()
        if len(args) > 1 or type(args[0]) not in (list, tuple, set, frozenset, dict):
            return None
        self.copied += len(args[0])
        if self.copied > MAX_COPIED:
            raise self.unsafe("builds huge objects from small ones")
        return args[0]

    def check_key(self, key: Any, depth: int = 0) -> None:
        kind = type(key)
        if kind in (str, bool, float, bytes, Inert) or key is None:
            return
        if kind is int:
            if abs(key) >= _MAX_KEY_INT:
                raise self.unsafe("uses a huge number as a key")
        elif kind is tuple:
            self.tuple_keys += len(key) + 1
            if depth > 3 or len(key) > 64 or self.tuple_keys > MAX_TUPLE_KEYS:
                raise self.unsafe("uses deep, long or too many tuples as keys")
            for part in key:
                self.check_key(part, depth + 1)
        else:
            raise Malformed(f"a key of type {kind.__name__}")

    def set_items(self, target: Any, flat: list[Any]) -> None:
        if type(target) is Inert:
            if target.mapping is None:
                target.mapping = {}
            target = target.mapping
        elif type(target) is not dict:
            raise Malformed(f"items set on {type(target).__name__}")
        if len(flat) % 2:
            raise Malformed("a key without a value")
        for at in range(0, len(flat), 2):
            key, value = flat[at], flat[at + 1]
            if type(key) is not str:
                self.check_key(key)
            elif type(value) is StoredTensor:
                value = StoredTensor(key, value.dtype, value.shape, value.extents, value.strides)
            target[key] = value

    def append_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target += items
        elif type(target) is set:
            for item in items:
                self.check_key(item)
            target.update(items)
        elif type(target) is Inert:
            if target.items is None:
                target.items = []
            target.items += items
        else:
            raise Malformed(f"items appended to {type(target).__name__}")

    def make_set(self, items: Any) -> set[Any]:
        self.sets += 1
        if self.sets > MAX_SETS:
            raise self.unsafe(f"holds more than {MAX_SETS:,} sets")
        for item in items:
            self.check_key(item)
        return set(items)

    def make_container(self, name: str, args: tuple[Any, ...]) -> Any:
        """What calling one of `_CONTAINERS` gives; an Inert where the argument is no plain container."""
        if name == "collections.defaultdict":
            args = args[1:]
        items = self.copied_items(args)
        if items is None:
            return Inert(name, args)
        if name == "torch.Size":
            if len(items) > 64 or not all(type(size) is int for size in items):
                raise Malformed("a torch.Size that holds no sizes")
            return tuple(items)
        if name in ("builtins.set", "builtins.frozenset"):
            made = self.make_set(items)
            return made if name == "builtins.set" else frozenset(made)
        if name in ("builtins.list", "builtins.tuple"):
            return list(items) if name == "builtins.list" else tuple(items)
        pairs: dict[Any, Any] = {}
        for pair in items.items() if type(items) is dict else items:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise Malformed("a dict made from something that is no pair")
            self.set_items(pairs, list(pair))
        return pairs

    # -- opcodes: numbers ------------------------------------------------------------------------------------------

    def proto(self) -> None:
        version = self.number(1)
        if version > 5:
            raise Malformed(f"pickle protocol {version}, of which nothing is known")

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.pos:
            raise self.ends()

    def binint1(self) -> None:
        self.stack.append(self.data[self.pos])
        self.pos += 1

    def binint2(self) -> None:
        self.stack.append(self.number(2))

    def binint(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def long(self, size_bytes: int) -> None:
        size = self.number(size_bytes)
        if size > MAX_INT_BYTES:
            raise self.unsafe(f"holds a number of {size:,} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def int_line(self) -> None:
        text = self.line()
        self.stack.append(text == b"01" if text in (b"00", b"01") else int(text))

    def long_line(self) -> None:
        self.stack.append(int(self.line(4 * MAX_INT_BYTES).rstrip(b"L")))

    def float_line(self) -> None:
        self.stack.append(float(self.line()))

    # -- opcodes: text ---------------------------------------------------------------------------------------------

    def text(self, size_bytes: int) -> None:
        count = self.number(size_bytes)
        chunk = self.payload(count)
        self.stack.append(Elided(count) if chunk is None else chunk.decode())

    def raw(self, size_bytes: int) -> None:
        count = self.number(size_bytes)
        chunk = self.payload(count)
        self.stack.append(Elided(count) if chunk is None else chunk)

    def old_string(self, size_bytes: int) -> None:
        self.raw(size_bytes)
        self.stack.append(_as_text(self.stack.pop()))

    def string_line(self) -> None:
        text = self.line(MAX_TEXT)
        self.count_text(len(text))
        if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
            raise Malformed("a string without its quotes")
        self.stack.append(_as_text(codecs.escape_decode(text[1:-1])[0]))

    def unicode_line(self) -> None:
        text = self.line(MAX_TEXT)
        self.count_text(len(text))
        self.stack.append(text.decode("raw-unicode-escape"))

    # -- opcodes: stack and memo -----------------------------------------------------------------------------------

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def again(self, value: Any) -> None:
        if value is self.getattr:
            self.loose_getattrs += 1
        self.stack.append(value)

    def dup(self) -> None:
        self.again(self.stack[-1])

    def binget(self) -> None:
        value = self.memo[self.data[self.pos]]
        self.pos += 1
        self.again(value)

    def long_binget(self) -> None:
        self.again(self.memo[self.number(4)])

    def get_line(self) -> None:
        self.again(self.memo[int(self.line())])

    def binput(self) -> None:
        self.memo[self.data[self.pos]] = self.stack[-1]
        self.pos += 1

    def long_binput(self) -> None:
        self.memo[self.number(4)] = self.stack[-1]

    def put_line(self) -> None:
        self.memo[int(self.line())] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # -- opcodes: containers ---------------------------------------------------------------------------------------

    def short_tuple(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    def marked(self, make: Callable[[_Machine, list[Any]], Any]) -> None:
        made = make(self, self.pop_mark())  # first: it changes which list `self.stack` is
        self.stack.append(made)

    def dict_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(self.stack[-1], items)

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)

    def append(self) -> None:
        item = self.stack.pop()
        self.append_items(self.stack[-1], [item])

    def appends(self) -> None:
        items = self.pop_mark()
        self.append_items(self.stack[-1], items)

    # -- opcodes: globals, calls, state ----------------------------------------------------------------------------

    def global_line(self) -> None:
        module = self.line().decode()
        self.push_global(module, self.line().decode())

    def stack_global(self) -> None:
        name = self.stack.pop()
        self.push_global(self.stack.pop(), name)

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        made = self.call_getattr(args) if function is self.getattr else self.call(function, args)
        self.stack.append(made)

    def newobj(self) -> None:
        args = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), args))

    def newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self.newobj()
        if type(self.stack[-1]) is Inert:
            self.stack[-1].state = keywords

    def obj(self) -> None:
        cls, *args = self.pop_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def inst(self) -> None:
        self.global_line()
        cls = self.stack.pop()
        args = tuple(self.pop_mark())
        self.stack.append(self.call(cls, args))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Inert:
            if target.args is None:
                raise self.unsafe(f"sets attributes of {shown(target.name)} itself")
            target.state = state
        elif target is None or type(target) in (str, bytes, int, float, bool, tuple):
            raise Malformed(f"state set on {type(target).__name__}")
        # Else a dict, set or tensor: the state is attributes (an OrderedDict's `_metadata`), which nothing here needs.

    def binpersid(self) -> None:
        if self.persistent is None:
            raise Malformed("a persistent id where none is expected")
        self.stack.append(self.persistent(self.stack.pop()))

    def persid(self) -> None:
        raise Malformed("a persistent id in text form, which torch does not write")

    def extension(self) -> None:
        raise self.unsafe("uses the extension registry (EXT1, EXT2, EXT4), which hides the name of a global")

    def buffer(self) -> None:
        raise Malformed("an out-of-band buffer, which a file cannot hold")

    def unknown(self) -> None:
        raise Malformed(f"unknown opcode 0x{self.data[self.pos - 1]:02x}")


def _as_text(raw: Any) -> Any:
    """A Python 2 str: text where it is UTF-8, as torch.load reads it, else the bytes."""
    try:
        return raw.decode() if type(raw) is bytes else raw
    except UnicodeDecodeError:
        return raw


# int(), str(), bytes(), range() and so on stay Inert: nothing that is read needs their value, and they are how a short
# pickle asks for much memory.
_CONTAINERS = frozenset({
    "collections.OrderedDict", "collections.defaultdict", "torch.Size", "builtins.dict", "builtins.list",
    "builtins.tuple", "builtins.set", "builtins.frozenset",
})  # fmt: skip

_M = _Machine
_HANDLERS: list[Callable[[_Machine], None]] = [_M.unknown] * 256
for _codes, _handlers in (
    # one line a group, in the order of the methods above
    ("80 95 4b 4d 4a", (_M.proto, _M.frame, _M.binint1, _M.binint2, _M.binint)),
    ("8a 8b 47", (lambda m: m.long(1), lambda m: m.long(4), _M.binfloat)),
    ("49 4c 46", (_M.int_line, _M.long_line, _M.float_line)),
    ("4e 88 89", (lambda m: m.stack.append(None), lambda m: m.stack.append(True), lambda m: m.stack.append(False))),
    ("8c 58 8d", (lambda m: m.text(1), lambda m: m.text(4), lambda m: m.text(8))),
    ("43 42 8e 96", (lambda m: m.raw(1), lambda m: m.raw(4), lambda m: m.raw(8), lambda m: m.raw(8))),
    ("55 54 53 56", (lambda m: m.old_string(1), lambda m: m.old_string(4), _M.string_line, _M.unicode_line)),
    ("28 30 31 32", (_M.mark, _M.pop, _M.pop_mark, _M.dup)),
    ("68 6a 67 71 72 70 94", (
        _M.binget, _M.long_binget, _M.get_line, _M.binput, _M.long_binput, _M.put_line, _M.memoize,
    )),
    ("29 7d 5d 8f", (
        lambda m: m.stack.append(()), lambda m: m.stack.append({}), lambda m: m.stack.append([]),
        lambda m: m.stack.append(m.make_set(())),
    )),
    ("85 86 87", (lambda m: m.short_tuple(1), lambda m: m.short_tuple(2), lambda m: m.short_tuple(3))),
    ("74 6c 91", (
        lambda m: m.marked(lambda _, items: tuple(items)), lambda m: m.marked(lambda _, items: items),
        lambda m: m.marked(lambda inner, items: frozenset(inner.make_set(items))),
    )),
    ("64 73 75 61 65 90", (_M.dict_from_mark, _M.setitem, _M.setitems, _M.append, _M.appends, _M.appends)),
    ("63 93 52 81 92 6f 69 62", (
        _M.global_line, _M.stack_global, _M.reduce, _M.newobj, _M.newobj_ex, _M.obj, _M.inst, _M.build,
    )),
    ("51 50 82 83 84 97 98", (
        _M.binpersid, _M.persid, _M.extension, _M.extension, _M.extension, _M.buffer, _M.buffer,
    )),
):  # fmt: skip
    for _code, _handler in zip(bytes.fromhex(_codes), _handlers, strict=True):
        _HANDLERS[_code] = _handler
