"""An mmengine (xtuner) Python config, read without running it.

xtuner configs are Python programs, written as data: imports name classes, assignments build dicts. `evaluate` walks
the syntax tree and computes what is data; nothing is imported, called or compiled. What cannot be known this way
becomes a value that says so (`Dotted`, `Call`, `Unknown`), and only the reader that needs it complains.
Two syntaxes are read: configs as people write them, and the text mmengine writes into `meta.cfg` of a checkpoint.
The rules of `_base_` and `read_base` are those of mmengine 0.10.
"""

from __future__ import annotations

import ast
import builtins
import posixpath
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError
from llava_convert.storage.pyconfig import calls, values
from llava_convert.storage.pyconfig.values import MAX_TEXT, Budget, Call, Dotted, NotKnown, Unknown, known

__all__ = ["MAX_TEXT", "Call", "Dotted", "Unknown", "evaluate"]

MAX_DEPTH = 120  # of expressions and of blocks; a sum of 100 strings is still read
MAX_FILES = 64  # base configs, all together

# What an expression may fail with; it is then an Unknown, and only who needs it complains.
FAILURES = (NotKnown, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

Load = Callable[[str], "str | None"]


def evaluate(text: str, *, filename: str, load: Load | None = None) -> dict[str, Any]:
    """The top-level names of config `text` and their values, imports left out.

    `filename` names the config in errors. `load` gives the text of a base config by its path relative to this one's
    folder (with `/`, possibly with leading `..`), or None when there is none. Containers may be shared or hold
    themselves, as in Python: walk the result with a bound.

    Errors: InputError for a syntax error, a base that is missing or that inherits from itself; UnsafeError for text
    that tries to run code on being read (eval, subprocess, ...) or whose evaluation would exhaust the machine.
    """
    budget = Budget()
    try:
        config = _Config(filename, posixpath.basename(filename.replace("\\", "/")), load, budget, ())
        names = config.run(text)
    except (RecursionError, MemoryError):
        raise UnsafeError(f"{filename}: the config nests too deeply to be read", hint=values.PLAIN_HINT) from None
    return {name: value for name, value in names.items() if name not in config.imported and not name.startswith("__")}


class _Config:
    """One file's evaluation: its names so far, and where it is in the chain of files that inherit from each other."""

    def __init__(self, filename: str, path: str, load: Load | None, budget: Budget, chain: tuple[str, ...]) -> None:
        self.filename, self.path, self.load, self.budget = filename, path, load, budget
        self.chain = (*chain, path)
        self.names: MutableMapping[str, Any] = {}
        self.imported: set[str] = set()
        self.functions: dict[str, ast.AST] = {}
        self.base: dict[str, Any] | None = None
        self.depth = 0

    def run(self, text: str) -> dict[str, Any]:
        self.block(values.parse(text, self.filename).body)
        own = {name: value for name, value in self.names.items() if name != "_base_"}
        return own if self.base is None else values.merged(own, self.base, self.budget, self.filename)

    def at(self, node: ast.AST) -> str:
        return f"{self.filename}:{getattr(node, 'lineno', 1)}"

    def unknown(self, what: str, node: ast.AST) -> Unknown:
        return Unknown(what, self.at(node))

    # Statements.

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.budget.spend(1, self.at(statement))
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise UnsafeError(f"{self.at(statement)}: blocks nest too deeply", hint=values.PLAIN_HINT)
            self.statement(statement)
            self.depth -= 1

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                result = self.expr(value)
                for target in targets:
                    self.store(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.store(target, self.expr(value))
            case ast.AugAssign(target=target, op=op, value=value):
                old, new = self.expr(target), self.expr(value)
                self.store(target, self.guard(node, lambda: values.augmented(op, old, new, self.at(node))))
            case ast.Expr(value=value):
                result = self.expr(value)
                # A call for its effect, of something unseen: what it was given may have changed.
                if isinstance(value, ast.Call) and isinstance(result, Call | Unknown):
                    self.forget(value)
            case ast.Delete(targets=targets):
                for target in targets:
                    self.delete(target)
            case ast.If(test=test, body=body, orelse=orelse):
                truth = self.guard(node, lambda: bool(known(self.expr(test))))
                if isinstance(truth, Unknown):
                    self.forget(*body, *orelse)
                else:
                    self.block(body if truth else orelse)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                items = self.guard(node, lambda: values.items(self.expr(iterable)))
                jumps = any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(node))
                if jumps or isinstance(items, Unknown):
                    self.forget(node)
                else:
                    for item in items:
                        self.store(target, item)
                        self.block(body)
                    self.block(orelse)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))], body=body):
                for part in body:
                    self.inherit_names(part)
            case ast.Import(names=aliases):
                for alias in aliases:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.bind_import(name, alias.name if alias.asname else name)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                for alias in aliases:
                    self.bind_import(alias.asname or alias.name, f"{'.' * level}{module or ''}.{alias.name}")
            case ast.Pass() | ast.Assert() | ast.AnnAssign() | ast.Global():
                pass
            case _:  # def, class, while, try, other with: what they touch is unknown from here on
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    self.functions[node.name] = node
                    self.names[node.name] = self.unknown(f"{node.name}, defined by code", node)
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    self.forget(node)

    def bind_import(self, name: str, dotted: str) -> None:
        if name != "*":
            self.names[name] = Dotted(dotted)
            self.imported.add(name)

    def store(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                if name == "_base_":
                    value = self.base = self.inherited(target, value)
                self.names[name] = value
                self.imported.discard(name)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                parts = self.guard(target, lambda: values.unpacked(targets, value))
                for i, part in enumerate(targets):
                    inner = part.value if isinstance(part, ast.Starred) else part
                    self.store(inner, parts if isinstance(parts, Unknown) else parts[i])
            case ast.Attribute(value=owner, attr=key):
                self.store_item(target, self.expr(owner), key, value)
            case ast.Subscript(value=owner, slice=index):
                self.store_item(target, self.expr(owner), self.expr(index), value)

    def store_item(self, target: ast.expr, owner: Any, key: Any, value: Any) -> None:
        if values.has_place(owner, key):
            owner[key] = value
        else:
            self.forget_root(target)

    def delete(self, target: ast.expr) -> None:
        match target:
            case ast.Name(id=name):
                self.names.pop(name, None)
                self.imported.discard(name)
            case ast.Attribute(value=owner, attr=str(key)):
                self.delete_item(target, self.expr(owner), key)
            case ast.Subscript(value=owner, slice=index):
                self.delete_item(target, self.expr(owner), self.expr(index))
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for part in targets:
                    self.delete(part)

    def delete_item(self, target: ast.expr, owner: Any, key: Any) -> None:
        if values.has_place(owner, key) and (isinstance(owner, list) or key in owner):
            del owner[key]
        else:
            self.forget_root(target)

    # What code that is not followed may have changed becomes unknown: a stale value would be a silent error.

    def forget(self, *nodes: ast.AST) -> None:
        for part in (part for node in nodes for part in ast.walk(node)):
            self.budget.spend(1, self.at(part))
            match part:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.FunctionDef(name=name):
                    self.names[name] = self.unknown(f"{name}, set by code that is not followed", part)
                case ast.alias(name=name, asname=asname):
                    bound = asname or name.partition(".")[0]
                    self.names[bound] = self.unknown(f"{bound}, imported by code that is not followed", part)
                case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                    self.forget_root(part)
                case ast.Call(func=ast.Name(id="print")):
                    pass
                case ast.Call(func=func, args=args, keywords=keywords):
                    for given in (func, *args, *(keyword.value for keyword in keywords)):
                        self.forget_root(given)

    def forget_root(self, node: ast.AST) -> None:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
            node = node.value
        if isinstance(node, ast.Name) and isinstance(self.names.get(node.id), dict | list):
            self.names[node.id] = self.unknown(f"{node.id}, changed by code that is not followed", node)

    # Inheritance.

    def load_config(self, node: ast.AST, relative: str) -> _Config:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), relative))
        if path in self.chain:
            raise InputError(f"{self.at(node)}: the config inherits from itself through {path}")
        self.budget.files += 1
        if self.budget.files > MAX_FILES or len(self.chain) > 16:
            raise UnsafeError(f"{self.at(node)}: more than {MAX_FILES} base configs", hint=values.PLAIN_HINT)
        text = self.load(path) if self.load else None
        if text is None:
            raise InputError(f"{self.at(node)}: base config {path} not found", hint=values.BASE_HINT)
        self.budget.spend(len(text) // 8, self.at(node))
        config = _Config(path, path, self.load, self.budget, self.chain)
        config.names = config.run(text)
        return config

    def inherit_names(self, node: ast.stmt) -> None:
        """`from .x import *` below `with read_base()`: a dot is this folder, each further one a folder up."""
        if not isinstance(node, ast.ImportFrom) or not node.module:
            raise InputError(f"{self.at(node)}: only `from ... import ...` may stand below `with read_base():`")
        config = self.load_config(node, "../" * (node.level - 1) + node.module.replace(".", "/") + ".py")
        for alias in node.names:
            wanted = list(config.names) if alias.name == "*" else [alias.name]
            for name in wanted:
                if name not in config.names:
                    raise InputError(f"{self.at(node)}: {config.path} defines no {name}")
                bound = alias.asname or name
                self.names[bound] = config.names[name]
                (self.imported.add if name in config.imported else self.imported.discard)(bound)

    def inherited(self, node: ast.AST, value: Any) -> dict[str, Any]:
        base: dict[str, Any] = {}
        for relative in [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else [None]:
            if not isinstance(relative, str):
                raise InputError(f"{self.at(node)}: _base_ is not a path or a list of paths", hint=values.BASE_HINT)
            config = self.load_config(node, relative)
            base.update((name, item) for name, item in config.names.items() if name not in config.imported)
        return base

    # Expressions.

    def excuse(self, error: Exception, node: ast.AST) -> Unknown:
        if isinstance(error, NotKnown):
            return error.source or self.unknown(str(error), node)
        return self.unknown(f"an expression that fails ({type(error).__name__})", node)

    def guard(self, node: ast.AST, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, or an Unknown with the reason that it gives nothing."""
        try:
            return compute()
        except FAILURES as error:
            return self.excuse(error, node)

    def expr(self, node: ast.expr) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnsafeError(f"{self.at(node)}: the expression nests too deeply", hint=values.PLAIN_HINT)
        try:
            result = self.compute(node)
        except FAILURES as error:
            result = self.excuse(error, node)
        self.depth -= 1
        made = 0 if isinstance(node, ast.Name | ast.Attribute | ast.Constant) else values.size(result)
        self.budget.spend(1 + made, self.at(node))
        return result

    def compute(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                if type(value) is int and value.bit_length() > values.MAX_BITS:
                    raise NotKnown("a number that is too large")
                return value
            case ast.Name(id=name):
                if name in self.names:
                    return self.names[name]
                if hasattr(builtins, name):
                    return Dotted(f"builtins.{name}")
                raise NotKnown(f"{name}, which the config does not define")
            case ast.Attribute(value=owner, attr=attr):
                return values.attribute(self.expr(owner), attr, self.at(node))
            case ast.Subscript(value=owner, slice=index):
                return values.item(self.expr(owner), self.expr(index))
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(known(self.expr(part)) if part else None for part in (lower, upper, step)))
            case ast.List(elts=parts):
                return list(self.elements(parts))
            case ast.Tuple(elts=parts):
                return tuple(self.elements(parts))
            case ast.Set(elts=[ast.Set(elts=[ast.Attribute() as reference])]):  # mmengine's {{_base_.name}}
                return self.expr(reference)
            case ast.Set(elts=parts):
                return set(map(values.key, self.elements(parts)))
            case ast.Dict(keys=keys, values=entries):
                result: dict[Any, Any] = {}
                for entry_key, entry in zip(keys, entries, strict=True):
                    value = self.expr(entry)
                    result.update({values.key(self.expr(entry_key)): value} if entry_key else values.mapping(value))
                return result
            case ast.BinOp(left=left, op=op, right=right):
                return values.binary(op, self.expr(left), self.expr(right), self.at(node))
            case ast.UnaryOp(op=op, operand=operand):
                return values.unary(op, self.expr(operand), self.at(node))
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    truth = known(self.expr(part))
                    if bool(truth) is isinstance(op, ast.Or):
                        break
                return truth
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [self.expr(part) for part in (left, *comparators)]
                self.budget.spend(sum(map(values.size, operands)), self.at(node))
                return all(values.compare(op, a, b) for op, a, b in zip(ops, operands, operands[1:], strict=False))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.expr(body if known(self.expr(test)) else orelse)
            case ast.NamedExpr(target=target, value=value):
                self.store(target, self.expr(value))
                return self.expr(target)
            case ast.JoinedStr(values=parts):
                return calls.joined("", [self.expr(part) for part in parts], self.at(node))
            case ast.FormattedValue(value=value, conversion=conversion, format_spec=spec):
                return calls.render(self.expr(value), conversion, self.expr(spec) if spec else "")
            case ast.ListComp(elt=elt, generators=generators) | ast.GeneratorExp(elt=elt, generators=generators):
                return self.comprehension(generators, lambda: self.expr(elt))
            case ast.SetComp(elt=elt, generators=generators):
                return set(self.comprehension(generators, lambda: values.key(self.expr(elt))))
            case ast.DictComp(key=key, value=value, generators=generators):
                return dict(self.comprehension(generators, lambda: (values.key(self.expr(key)), self.expr(value))))
            case ast.Call():
                return self.call(node)
            case _:  # lambda, await, yield
                raise NotKnown(f"a {type(node).__name__.lower()} expression")

    def elements(self, parts: Iterable[ast.expr]) -> Iterator[Any]:
        for part in parts:
            if isinstance(part, ast.Starred):
                yield from values.items(self.expr(part.value))
            else:
                yield self.expr(part)

    def comprehension(self, generators: list[ast.comprehension], make: Callable[[], Any]) -> list[Any]:
        """What `make` gives in each round; the names that the rounds bind end with them."""
        outer, self.names = self.names, ChainMap({}, self.names)
        try:
            return [make() for _ in self.nested(generators)]
        finally:
            self.names = outer

    def nested(self, generators: list[ast.comprehension]) -> Iterator[None]:
        if not generators:
            yield
            return
        for item in values.items(self.expr(generators[0].iter)):
            self.budget.spend(1, self.at(generators[0].target))
            self.store(generators[0].target, item)
            if all(known(self.expr(test)) for test in generators[0].ifs):
                yield from self.nested(generators[1:])

    def call(self, node: ast.Call) -> Any:
        where = self.at(node)
        args = list(self.elements(node.args))
        kwargs: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.expr(keyword.value)
            kwargs.update({keyword.arg: value} if keyword.arg else values.mapping(value))
        self.budget.spend(sum(map(values.size, (*args, kwargs))), where)
        if isinstance(node.func, ast.Attribute):
            owner = self.expr(node.func.value)
            self.budget.spend(values.size(owner), where)
            if type(owner) in calls.METHODS:
                try:
                    return calls.method(owner, node.func.attr, args, kwargs, where)
                except FAILURES:
                    self.forget_root(node.func)
                    raise
        function = self.expr(node.func)
        if isinstance(function, Dotted):
            if function.name == "copy.deepcopy" and len(args) == 1:
                return values.deep_copy(args[0], self.budget, where)
            return calls.call(function.name, args, kwargs, where)
        if isinstance(node.func, ast.Name):
            name = node.func.id
            if name in self.functions:  # it may change what it is given, and any name of the file
                self.forget(self.functions[name], node)
            return Call(name, tuple(args), kwargs, where)
        return known(function)
