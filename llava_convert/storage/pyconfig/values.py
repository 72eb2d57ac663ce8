"""Values of a statically read config, and the operations on them, each with a bound on what it may allocate.

`xtuner_config` walks the syntax; here is what its nodes compute. Only exact builtin types are ever operated on, by
whitelisted operations, so nothing a config defines can run.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError
from llava_convert.core.values import dataclass

# Real configs have 4 to 12 KB and under 3,000 tokens; parsing costs up to 1 KB of memory a token.
MAX_TEXT = 1_000_000
MAX_TOKENS = 150_000
MAX_ITEMS = 20_000  # of a list or dict
MAX_CHARS = 100_000  # of a string
MAX_BITS = 4096  # of a whole number; a billion has 30
MAX_COST = 200_000  # steps plus elements made, for a config with all its bases; a real one takes under 5,000

PLAIN_HINT = "write a plain config with the values in place of the code, and give it with --config CFG.py"
CONFIG_HINT = "give the config that the model was trained with: --config CFG.py"
BASE_HINT = "give the merged config instead: the .pth carries one (meta.cfg), and so does the training's work_dir"


@dataclass(frozen=True, slots=True)
class Dotted:
    """Something imported (or a builtin), by its full name: `transformers.AutoTokenizer.from_pretrained`."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was not made: of `dotted`, at `where` ("file:line")."""

    dotted: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that only running the config would give: `what` it is and `where` ("file:line")."""

    what: str
    where: str


class NotKnown(ValueError):
    """Raised within an expression which cannot be computed; the expression then becomes an `Unknown`."""

    def __init__(self, reason: str, source: Unknown | None = None) -> None:
        super().__init__(reason)
        self.source = source


class Budget:
    """What one evaluation, base configs included, may still cost."""

    def __init__(self) -> None:
        self.left = MAX_COST
        self.files = 0

    def spend(self, cost: int, where: str) -> None:
        self.left -= cost
        if self.left < 0:
            raise UnsafeError(f"{where}: evaluating the config takes too many steps", hint=PLAIN_HINT)


def parse(text: str, filename: str) -> ast.Module:
    if len(text) > MAX_TEXT or sum(1 for _ in re.finditer(r"\w+|[^\w\s]", text)) > MAX_TOKENS:
        limit = f"{MAX_TEXT:,} characters and {MAX_TOKENS:,} words"
        raise UnsafeError(f"{filename}: too large for a config (limit: {limit})", hint=PLAIN_HINT)
    try:
        with warnings.catch_warnings():  # '\d' in a config is no concern of the person who converts
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError as error:
        line = error.lineno or 1
        raise InputError(f"{filename}:{line}: not valid Python: {error.msg}", hint=CONFIG_HINT) from None
    except ValueError as error:  # null bytes, lone surrogates
        raise InputError(f"{filename}: not valid Python: {error}", hint=CONFIG_HINT) from None


def known(value: Any) -> Any:
    """`value`, when it is plain data at its top; else NotKnown."""
    match value:
        case Unknown():
            raise NotKnown(value.what, value)
        case Dotted(name=name) | Call(dotted=name):
            raise NotKnown(f"a value that depends on {name}")
    return value


def size(value: Any) -> int:
    """The cost of having made `value`: its elements, or a sixteenth of its characters."""
    if isinstance(value, str):
        return len(value) // 16
    return len(value) if isinstance(value, list | tuple | dict | set) else 0


def bounded(length: int, limit: int, where: str) -> None:
    if length > limit:
        raise UnsafeError(f"{where}: an expression would make {length:,} elements or characters", hint=PLAIN_HINT)


def is_key(value: Any) -> bool:
    """Keys are scalars, or tuples of scalars; a nested one could take for ever to hash."""
    parts = value if type(value) is tuple else (value,)
    return all(part is None or type(part) in (str, int, float, bool, bytes) for part in parts)


def key(value: Any) -> Any:
    if not is_key(known(value)):
        raise NotKnown("a dict or set with an unusual key")
    return value


def items(value: Any) -> list[Any]:
    """What iterating gives; a set in a fixed order, so that no result depends on the hash seed."""
    if isinstance(known(value), set):
        return sorted(value, key=repr)
    if not isinstance(value, list | tuple | dict | str):
        raise NotKnown(f"a loop over a {type(value).__name__}")
    return list(value)


def mapping(value: Any) -> dict[Any, Any]:
    if isinstance(known(value), dict):
        return dict(value)
    pairs = [items(pair) for pair in items(value)]
    if any(len(pair) != 2 for pair in pairs):
        raise NotKnown("a dict from what is not pairs")
    return {key(name): entry for name, entry in pairs}


def unpacked(targets: list[ast.expr], value: Any) -> list[Any]:
    """One part for each target of `a, *b, c = value`."""
    parts = items(value)
    stars = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
    if stars and len(parts) >= len(targets) - 1:
        first, tail = stars[0], len(targets) - 1 - stars[0]
        end = len(parts) - tail
        return [*parts[:first], parts[first:end], *parts[end:]]
    if len(parts) != len(targets):
        raise NotKnown(f"{len(parts)} values for {len(targets)} names")
    return parts


# Names that lead from a value to the interpreter's insides. Nothing follows them; a config that asks is refused.
_INSIDES = frozenset(
    {"__class__", "__base__", "__bases__", "__mro__", "__subclasses__", "__globals__", "__builtins__", "__code__"}
    | {"__getattribute__", "__import__", "__loader__", "__dict__", "__reduce__", "__reduce_ex__"}
)


def attribute(owner: Any, name: str, where: str) -> Any:
    if name in _INSIDES:
        raise UnsafeError(f"{where}: the config reaches for Python's insides ({name})", hint=PLAIN_HINT)
    if isinstance(owner, Dotted):
        return Dotted(f"{owner.name}.{name}")
    if isinstance(known(owner), dict) and name in owner:  # mmengine's ConfigDict
        return owner[name]
    raise NotKnown(f"attribute {name} of a {type(owner).__name__}")


def item(owner: Any, index: Any) -> Any:
    if isinstance(owner, Dotted) and isinstance(index, str) and index.isidentifier():
        return Dotted(f"{owner.name}.{index}")  # PROMPT_TEMPLATE['vicuna']
    if isinstance(known(owner), dict):
        return owner[key(index)]
    return owner[known(index)]


def is_number(value: Any) -> bool:
    return type(value) in (int, float, bool)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.BitXor: operator.xor,
}  # fmt: skip


def binary(op: ast.operator, a: Any, b: Any, where: str) -> Any:
    known(a), known(b)
    if is_number(a) and is_number(b) and type(op) in _ARITHMETIC:
        _small(op, a, b, where)
        result = _ARITHMETIC[type(op)](a, b)
        if is_number(result):  # a power of a negative number may be complex
            return result
    elif isinstance(op, ast.Add) and type(a) is type(b) and type(a) in (str, list, tuple):
        bounded(len(a) + len(b), MAX_CHARS if isinstance(a, str) else MAX_ITEMS, where)
        return a + b
    elif isinstance(op, ast.Mult) and (type(a) is int or type(b) is int):
        sequence, times = (b, a) if type(a) is int else (a, b)
        if type(sequence) in (str, list, tuple):
            bounded(len(sequence) * max(times, 0), MAX_CHARS if isinstance(sequence, str) else MAX_ITEMS, where)
            return sequence * times
    elif isinstance(op, ast.BitOr) and isinstance(a, dict) and isinstance(b, dict):
        return a | b
    raise NotKnown(f"{type(op).__name__} of a {type(a).__name__} and a {type(b).__name__}")


def _small(op: ast.operator, a: Any, b: Any, where: str) -> None:
    """Refuses arithmetic on huge whole numbers before it is done (9**9**9, 1 << 10**10)."""
    whole = [int(value) for value in (a, b) if not isinstance(value, float)]
    bits = max((value.bit_length() for value in whole), default=0)
    if len(whole) == 2 and isinstance(op, ast.Pow):
        bits = max(bits, whole[0].bit_length() * max(whole[1], 0))
    if len(whole) == 2 and isinstance(op, ast.LShift):
        bits = max(bits, whole[0].bit_length() + max(whole[1], 0))
    if bits > MAX_BITS:
        raise UnsafeError(f"{where}: arithmetic on a number of over {MAX_BITS} bits", hint=PLAIN_HINT)


def augmented(op: ast.operator, old: Any, new: Any, where: str) -> Any:
    """`old op= new`; a list grows in place, for every name that it has."""
    if isinstance(op, ast.Add) and isinstance(old, list):
        more = items(new)
        bounded(len(old) + len(more), MAX_ITEMS, where)
        old.extend(more)
        return old
    return binary(op, old, new, where)


def unary(op: ast.unaryop, value: Any, where: str) -> Any:
    if isinstance(op, ast.Not):
        return not known(value)
    if not is_number(known(value)):
        raise NotKnown(f"{type(op).__name__} of a {type(value).__name__}")
    return -value if isinstance(op, ast.USub) else +value if isinstance(op, ast.UAdd) else ~value


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def compare(op: ast.cmpop, a: Any, b: Any) -> bool:
    if isinstance(op, ast.Is | ast.IsNot):
        # `x is None` is the one use; an import is not None, a call's result may be.
        if not (a is None or b is None) or isinstance(a, Unknown | Call) or isinstance(b, Unknown | Call):
            raise NotKnown("an identity")
        return (a is b) is isinstance(op, ast.Is)
    known(a), known(b)
    for value in (a, b):  # flat data only: comparing nested shared lists takes exponential time
        if not is_key(value) and not (isinstance(value, list | tuple | dict | set) and all(map(is_key, value))):
            raise NotKnown("a comparison of nested values")
        if isinstance(value, dict) and not (isinstance(op, ast.In | ast.NotIn) or all(map(is_key, value.values()))):
            raise NotKnown("a comparison of nested values")
    return bool(_COMPARE[type(op)](a, b))


def merged(new: Mapping[Any, Any], old: Mapping[Any, Any], budget: Budget, filename: str) -> dict[Any, Any]:
    """`new` over `old`, dict by dict; `_delete_=True` replaces instead (mmengine 0.10, Config._merge_a_into_b)."""
    budget.spend(len(new) + len(old), filename)
    result = dict(old)
    for name, value in new.items():
        if not isinstance(value, dict):
            result[name] = value
            continue
        inner = {k: v for k, v in value.items() if k != "_delete_"}
        if name not in old or value.get("_delete_"):
            result[name] = inner
        elif isinstance(old[name], dict):
            result[name] = merged(inner, old[name], budget, filename)
        else:
            raise InputError(f"{filename}: {name} is a dict here but not in its base", hint="set _delete_=True in it")
    return result


def deep_copy(value: Any, budget: Budget, where: str, done: dict[int, Any] | None = None) -> Any:
    """copy.deepcopy of containers, at a price; what is shared stays shared."""
    done = {} if done is None else done
    if id(value) not in done:
        budget.spend(1, where)
        if isinstance(value, dict):
            made: dict[Any, Any] = {}
            done[id(value)] = made
            made.update((name, deep_copy(part, budget, where, done)) for name, part in value.items())
        elif isinstance(value, list):
            grown: list[Any] = []
            done[id(value)] = grown
            grown.extend(deep_copy(part, budget, where, done) for part in value)
        elif isinstance(value, tuple):
            done[id(value)] = tuple(deep_copy(part, budget, where, done) for part in value)
        else:
            return value
    return done[id(value)]


def has_place(owner: Any, place: Any) -> bool:
    """Whether `owner[place]` can be set or deleted: any key of a dict, an index within a list."""
    if isinstance(owner, dict):
        return is_key(place) and len(owner) < MAX_ITEMS
    return isinstance(owner, list) and isinstance(place, int) and -len(owner) <= place < len(owner)
