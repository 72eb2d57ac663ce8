"""What a pickle may name, and what stands in the tree for what is not kept.

No global is imported or called, whatever its name: safety does not rest on these lists. The forbidden ones exist to
*say* that a file is hostile, instead of quietly reading past it; every other one becomes an `Inert`.
"""

from __future__ import annotations

from typing import Any

from llava_convert.core.text import printable
from llava_convert.core.values import dataclass

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

GETATTR = "builtins.getattr"
_MAX_METHOD = 100  # characters; HistoryBuffer's longest is `register_statistics`
# Globals so plain that nobody needs to hear of them.
QUIET_BUILTINS = frozenset(
    f"builtins.{kind.__name__}"
    for kind in (
        set, frozenset, list, dict, tuple, int, float, str, bytes, bytearray, complex, slice, range, bool, object,
    )
)  # fmt: skip


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
        return f"<Inert {printable(self.name)}{'' if self.args is None else ' instance'}>"


@dataclass(frozen=True, slots=True)
class Elided:
    """Stands for a text or bytes of `nbytes` which was not kept, being longer than `pickle_limits.MAX_TEXT`."""

    nbytes: int


def modern(module: str, name: str) -> tuple[str, str]:
    """A global as Python 3 calls it."""
    module = _OLD_MODULES.get(module, module)
    return module, _OLD_BUILTINS.get(name, name) if module == "builtins" else name


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


def is_config_dict(name: str) -> bool:
    """mmengine's ConfigDict, which is pickled as a call with a plain dict."""
    return name.startswith(("mmengine.", "mmcv.")) and name.endswith(".ConfigDict")


def history_buffer_method(args: Any) -> Inert | None:
    """What `getattr(*args)` names where that is a method of mmengine's HistoryBuffer, its only use in real files."""
    if type(args) is tuple and len(args) == 2 and type(args[0]) is Inert and type(args[1]) is str:
        owner, method = args
        real = owner.name.startswith("mmengine.") and owner.name.endswith(".HistoryBuffer")
        if real and owner.args is None and len(method) <= _MAX_METHOD and method.isidentifier():
            return Inert(f"{owner.name}.{method}")
    return None
