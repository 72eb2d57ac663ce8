"""Reads a pickle as data: nothing that a pickle names is imported, looked up or called.

This is a stack machine of its own, not a subclass of `pickle.Unpickler`, for two reasons. The C unpickler sizes its
memo by the largest index that it is told (`LONG_BINPUT 0x7fffffff` takes 16 GiB) and calls whatever `find_class` gives
it; here the only things ever called are `pickle_containers.MADE` and the caller's builders, so that safety does not
rest on a list of names (`pickle_globals`). What a pickle may cost is in `pickle_limits`.

Opcodes and their meaning: CPython's `Lib/pickletools.py`. What real checkpoints hold: mmengine's HistoryBuffer pickles
its statistics as `getattr(HistoryBuffer, "min")`, numpy scalars, ConfigDict, DeepSpeed's LossScaler and enums.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.pickle import containers
from llava_convert.storage.pickle import globals as names
from llava_convert.storage.pickle.globals import Elided, Inert
from llava_convert.storage.pickle.limits import (
    MAX_GLOBALS,
    MAX_NAME,
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    MEMO_GAP,
    Costs,
    Hostile,
    Malformed,
    check_tree,
)
from llava_convert.storage.pickle.operands import Ends, Operands

__all__ = ["MAX_PICKLE_BYTES", "Builder", "Elided", "Inert", "Loaded", "Malformed", "Persistent", "PickleEnds", "load"]

Persistent = Callable[[Any], Any]
Builder = Callable[[tuple[Any, ...]], Any]

_GETATTR_USE = "uses builtins.getattr other than on mmengine's HistoryBuffer"


class PickleEnds(InputError):
    """The data end inside the pickle."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """`root` is the tree, `stubs` the sorted names of the globals that became inert, `end` the offset after STOP."""

    root: Any
    stubs: tuple[str, ...]
    end: int


def load(
    data: bytes,
    *,
    path: Path,
    start: int = 0,
    persistent: Persistent | None = None,
    builders: Mapping[str, Builder] | None = None,
    quiet: Callable[[str], bool] = lambda name: False,
    operations: int = MAX_OPCODES,
) -> Loaded:
    """The tree of the pickle at `start` of `data`, of at most `operations`; `path` is for messages.

    The tree holds dict, list, tuple, set, frozenset, str, bytes, int, float, bool, None, `Elided`, `Inert` and what
    `persistent` (given a persistent id) and `builders` (dotted name -> function of the arguments) return. Those two
    are the caller's own code, and raise Malformed where their arguments are wrong. A StoredTensor set under a str key
    takes it as its name. Globals for which `quiet` holds are not listed in `stubs`.

    Raises PickleEnds when data end early, InputError when they are no pickle, UnsafeError when the pickle names
    something that runs code or would exhaust the machine (rows 35 and 36 of the fault list).
    """
    if len(data) - start > MAX_PICKLE_BYTES:
        raise UnsafeError(f"{path}: its pickle has {len(data) - start:,} bytes; {MAX_PICKLE_BYTES:,} are the most read")
    costs = Costs()
    operands = Operands(data, start, costs)
    machine = _Machine(operands, costs, persistent, builders or {}, quiet)
    try:
        root = machine.run(operations)
        check_tree(root)
    except Hostile as error:
        raise UnsafeError(
            f"{path}: refused, its pickle {error}. Nothing of it was run.",
            hint="A checkpoint needs none of this: do not load the file elsewhere, and get it from its maker again",
        ) from None
    except Malformed as error:
        raise InputError(f"{path}: damaged pickle at byte {operands.pos}: {error}") from None
    except Ends:
        raise PickleEnds(f"{path}: its pickle ends early: the file is truncated or damaged") from None
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error):
        # Stack underflow, unknown memo keys, wrong types, bad UTF-8: what a damaged pickle does to a machine.
        if operands.pos >= len(data):
            raise PickleEnds(f"{path}: its pickle ends early: the file is truncated or damaged") from None
        raise InputError(f"{path}: damaged pickle at byte {operands.pos}") from None
    return Loaded(root, tuple(sorted(machine.stubs)), operands.pos)


class _Machine:
    """One run over one pickle; `_ACTIONS` below says which method serves which opcode."""

    def __init__(
        self,
        operands: Operands,
        costs: Costs,
        persistent: Persistent | None,
        builders: Mapping[str, Builder],
        quiet: Callable[[str], bool],
    ) -> None:
        self.operands, self.costs = operands, costs
        self.persistent, self.builders, self.quiet = persistent, builders, quiet
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []  # as picklers number it, from 0 upwards: a dict takes ten times as much
        self.ahead: dict[int, Any] = {}  # and by numbers that are not yet its turn
        self.globals: dict[tuple[str, str], Inert] = {}
        self.stubs: set[str] = set()
        self.getattr = Inert(names.GETATTR)
        self.loose_getattrs = 0  # pushed and not (yet) called with HistoryBuffer

    def run(self, operations: int) -> Any:
        operands, data, handlers = self.operands, self.operands.data, _HANDLERS
        for _ in range(operations):
            opcode = data[operands.pos]
            operands.pos += 1
            if opcode == 0x2E:  # STOP
                root = self.stack.pop()
                if self.loose_getattrs:
                    raise Hostile(_GETATTR_USE)
                return root
            handlers[opcode](self)
        raise Hostile(f"has more than {operations:,} operations")

    # -- opcodes: stack and memo -----------------------------------------------------------------------------------

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def push(self, value: Any) -> None:
        """For what may be the global getattr: each use of it must turn out to be a call with HistoryBuffer."""
        if value is self.getattr:
            self.loose_getattrs += 1
        self.stack.append(value)

    def dup(self) -> None:
        self.push(self.stack[-1])

    def get(self, size_bytes: int) -> None:
        self.push(self.recall(self.operands.number(size_bytes)))

    def get_line(self) -> None:
        self.push(self.recall(int(self.operands.line())))

    def put(self, index: int) -> None:
        if not 0 <= index <= self.memo_size + MEMO_GAP:
            self.costs.memo_leap()
        self.remember(index, self.stack[-1])

    def memoize(self) -> None:
        self.remember(self.memo_size, self.stack[-1])

    @property
    def memo_size(self) -> int:
        return len(self.memo) + len(self.ahead)

    def remember(self, index: int, value: Any) -> None:
        memo, ahead = self.memo, self.ahead
        if index != len(memo):
            if 0 <= index < len(memo):
                memo[index] = value
            else:
                ahead[index] = value
            return
        memo.append(value)
        ahead.pop(index, None)
        while ahead and len(memo) in ahead:
            memo.append(ahead.pop(len(memo)))

    def recall(self, index: int) -> Any:
        return self.memo[index] if 0 <= index < len(self.memo) else self.ahead[index]

    # -- opcodes: containers ---------------------------------------------------------------------------------------

    def empty_set(self) -> None:
        self.stack.append(containers.make_set((), self.costs))

    def short_tuple(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    def tuple_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def list_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def frozenset_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(containers.make_set(items, self.costs)))

    def dict_from_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        containers.set_items(self.stack[-1], items, self.costs)

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        containers.set_items(self.stack[-1], [key, value], self.costs)

    def setitems(self) -> None:
        items = self.pop_mark()
        containers.set_items(self.stack[-1], items, self.costs)

    def append(self) -> None:
        item = self.stack.pop()
        containers.append_items(self.stack[-1], [item], self.costs)

    def appends(self) -> None:
        items = self.pop_mark()
        containers.append_items(self.stack[-1], items, self.costs)

    # -- opcodes: globals, calls, state ----------------------------------------------------------------------------

    def resolve(self, module: Any, name: Any) -> Inert:
        if type(module) is not str or type(name) is not str or not module or not name:
            raise Malformed("a global without a name")
        if (module, name) in self.globals:
            return self.globals[module, name]
        if len(module) + len(name) > MAX_NAME:
            raise Hostile(f"names a global of {len(module) + len(name)} characters")
        if len(self.globals) >= MAX_GLOBALS:
            raise Hostile(f"names more than {MAX_GLOBALS:,} globals")
        new_module, new_name = names.modern(module, name)
        full = f"{new_module}.{new_name}"
        if names.forbidden(new_module, new_name):
            raise Hostile(f"names {printable(full)}, which can run code")
        found = self.getattr if full == names.GETATTR else Inert(full)
        known = full in names.QUIET_BUILTINS or full in containers.MADE or full in self.builders
        if found is not self.getattr and not known and not self.quiet(full):
            self.stubs.add(full)
        self.globals[module, name] = found
        return found

    def call(self, function: Any, args: Any) -> Any:
        """What stands for `function(*args)`: our own container or tensor, else an Inert."""
        if type(function) is not Inert or type(args) is not tuple:
            raise Malformed("a call of something that is no global")
        if function is self.getattr:
            raise Hostile(_GETATTR_USE)
        if function.args is not None:
            return Inert(function.name, args)
        if function.name in containers.MADE:
            return containers.make(function.name, args, self.costs)
        builder = self.builders.get(function.name)
        if builder is not None:
            self.costs.built()
            return builder(args)
        if names.is_config_dict(function.name) and len(args) <= 1 and all(type(arg) is dict for arg in args):
            return args[0] if args else {}
        return Inert(function.name, args)

    def global_line(self) -> None:
        module = self.operands.line().decode()
        self.push(self.resolve(module, self.operands.line().decode()))

    def stack_global(self) -> None:
        name = self.stack.pop()
        self.push(self.resolve(self.stack.pop(), name))

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        if function is self.getattr and (method := names.history_buffer_method(args)) is not None:
            self.loose_getattrs -= 1
            self.stack.append(method)
        else:
            self.stack.append(self.call(function, args))

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
                raise Hostile(f"sets attributes of {printable(target.name)} itself")
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
        raise Hostile("uses the extension registry (EXT1, EXT2, EXT4), which hides the name of a global")

    def buffer(self) -> None:
        raise Malformed("an out-of-band buffer, which a file cannot hold")

    def unknown(self) -> None:
        raise Malformed(f"unknown opcode 0x{self.operands.data[self.operands.pos - 1]:02x}")


def _value(read: Callable[[Operands], Any]) -> Callable[[_Machine], object]:
    return lambda machine: machine.stack.append(read(machine.operands))


_M = _Machine
_O = Operands
# Opcodes that push what they read.
_VALUES: dict[int, Callable[[Operands], Any]] = {
    0x4E: lambda o: None, 0x88: lambda o: True, 0x89: lambda o: False,
    0x4B: lambda o: o.number(1), 0x4D: lambda o: o.number(2), 0x4A: lambda o: o.signed(4),
    0x8A: lambda o: o.long(1), 0x8B: lambda o: o.long(4), 0x47: _O.float8,
    0x49: _O.int_line, 0x4C: _O.long_line, 0x46: _O.float_line,
    0x8C: lambda o: o.text(1), 0x58: lambda o: o.text(4), 0x8D: lambda o: o.text(8),
    0x43: lambda o: o.raw(1), 0x42: lambda o: o.raw(4), 0x8E: lambda o: o.raw(8), 0x96: lambda o: o.raw(8),
    0x55: lambda o: o.old_string(1), 0x54: lambda o: o.old_string(4), 0x53: _O.string_line, 0x56: _O.unicode_line,
    0x29: lambda o: (), 0x7D: lambda o: {}, 0x5D: lambda o: [],
}  # fmt: skip
# Every other opcode except STOP.
_ACTIONS: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m.operands.check_protocol(), 0x95: lambda m: m.operands.check_frame(),
    0x28: _M.mark, 0x30: _M.pop, 0x31: _M.pop_mark, 0x32: _M.dup,
    0x68: lambda m: m.get(1), 0x6A: lambda m: m.get(4), 0x67: _M.get_line,
    0x71: lambda m: m.put(m.operands.number(1)), 0x72: lambda m: m.put(m.operands.number(4)),
    0x70: lambda m: m.put(int(m.operands.line())), 0x94: _M.memoize,
    0x85: lambda m: m.short_tuple(1), 0x86: lambda m: m.short_tuple(2), 0x87: lambda m: m.short_tuple(3),
    0x8F: _M.empty_set, 0x74: _M.tuple_from_mark, 0x6C: _M.list_from_mark, 0x91: _M.frozenset_from_mark,
    0x64: _M.dict_from_mark, 0x73: _M.setitem, 0x75: _M.setitems,
    0x61: _M.append, 0x65: _M.appends, 0x90: _M.appends,
    0x63: _M.global_line, 0x93: _M.stack_global,
    0x52: _M.reduce, 0x81: _M.newobj, 0x92: _M.newobj_ex, 0x6F: _M.obj, 0x69: _M.inst, 0x62: _M.build,
    0x51: _M.binpersid, 0x50: _M.persid,
    0x82: _M.extension, 0x83: _M.extension, 0x84: _M.extension, 0x97: _M.buffer, 0x98: _M.buffer,
}  # fmt: skip
_HANDLERS = [_ACTIONS.get(code) or (_value(_VALUES[code]) if code in _VALUES else _M.unknown) for code in range(256)]
