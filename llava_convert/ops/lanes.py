"""A small compiler: arithmetic on float32, `LANES` numbers side by side in the processor's vectors, by LLVM.

A kernel is a Python function that runs once and writes code: each operation on a `Value` is one instruction for all
lanes. Each rounds as IEEE 754 says, in the order in which it was written. Nothing is contracted to a fused product and
sum, so that the results are those of plain C on every processor.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

# As wide as AVX-512. Where vectors are shorter LLVM takes several: ns a weight of Q4_K with AVX-512, by lanes: 8 (6.4),
# 16 (3.5), 32 (2.9, and twice the time to compile).
LANES = 16

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS, _BYTES = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, _I8))
# Adding it leaves a number that is rounded to nearest even in the lowest 23 bits, 0x400000 being zero.
_TO_INTEGER = 12582912.0  # 1.5 × 2^23
_MANTISSA, _ZERO = 0x7FFFFF, 0x400000


class Value:
    """A float32 in each lane; of a comparison, a truth."""

    def __init__(self, code: Code, value: Any) -> None:
        self.code, self.value = code, value

    def _with(self, operation: str, other: Value | float) -> Value:
        return Value(self.code, getattr(self.code.builder, operation)(self.value, self.code.number(other).value))

    def _compared(self, how: str, other: Value | float) -> Value:
        return Value(self.code, self.code.builder.fcmp_ordered(how, self.value, self.code.number(other).value))

    def __add__(self, other: Value | float) -> Value:
        return self._with("fadd", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._with("fsub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._with("fmul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with("fdiv", other)

    def __rsub__(self, other: float) -> Value:
        return self.code.number(other) - self

    def __rtruediv__(self, other: float) -> Value:
        return self.code.number(other) / self

    def __and__(self, other: Value) -> Value:
        return Value(self.code, self.code.builder.and_(self.value, other.value))

    def __lt__(self, other: Value | float) -> Value:
        return self._compared("<", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compared(">", other)

    def equals(self, other: Value | float) -> Value:
        return self._compared("==", other)

    def choose(self, this: Value | float, other: Value | float) -> Value:
        """Of a truth: `this` where it holds, else `other`."""
        number = self.code.number
        return Value(self.code, self.code.builder.select(self.value, number(this).value, number(other).value))

    def magnitude(self) -> Value:
        return self.code.call("fabs", self)

    def root(self) -> Value:
        return self.code.call("sqrt", self)

    def rounded(self) -> Value:
        """The nearest integer, halves away from zero."""
        return self.code.call("round", self)

    def nearest(self, least: int, most: int) -> Value:
        """The nearest integer, halves to even, not below `least` nor above `most`.

        As ggml's `nearest_int`, for numbers too that are out of its range or not finite.
        """
        builder = self.code.builder
        whole = builder.bitcast((self + _TO_INTEGER).value, _INTS)
        whole = builder.sub(builder.and_(whole, _integers(_MANTISSA)), _integers(_ZERO))
        for bound, how in ((_integers(most), "<"), (_integers(least), ">")):
            whole = builder.select(builder.icmp_signed(how, whole, bound), whole, bound)
        return Value(self.code, builder.sitofp(whole, _FLOATS))


class Code:
    """The body of a kernel, which is run for each group. What a group is the kernel's own reads and writes say."""

    def __init__(self, function: ir.Function, builder: ir.IRBuilder, group: Any) -> None:
        self.function, self.builder, self.group = function, builder, group

    def number(self, number: Value | float) -> Value:
        """The same number in each lane."""
        return number if isinstance(number, Value) else Value(self, ir.Constant(_FLOATS, [float(number)] * LANES))

    def call(self, name: str, value: Value) -> Value:
        full = f"llvm.{name}.v{LANES}f32"
        known = self.function.module.globals.get(full)
        known = known or ir.Function(self.function.module, ir.FunctionType(_FLOATS, [_FLOATS]), full)
        return Value(self, self.builder.call(known, [value.value]))

    def across(self, argument: int, count: int) -> list[Value]:
        """LANES blocks of `count` numbers, a block to a lane."""
        start, builder = self._place(argument, LANES * count), self.builder
        with builder.goto_entry_block():
            turned = builder.alloca(ir.ArrayType(_FLOATS, count))
        with _loop(self.function, builder, _I64(count)) as at:
            value = ir.Constant(_FLOATS, ir.Undefined)
            for lane in range(LANES):
                one = builder.load(builder.gep(start, [builder.add(at, _I64(lane * count))]))
                value = builder.insert_element(value, one, _I32(lane))
            builder.store(value, builder.gep(turned, [_I64(0), at]))
        return [Value(self, builder.load(builder.gep(turned, [_I64(0), _I64(at)]))) for at in range(count)]

    def along(self, argument: int, count: int) -> list[Value]:
        """A block of `count` numbers, LANES of them to a value."""
        start = self._place(argument, count)
        return [Value(self, self._vector(start, at, _FLOATS, 4)) for at in range(0, count, LANES)]

    def one(self, argument: int) -> Value:
        """The group's number, in each lane."""
        return self._everywhere(self.builder.load(self._place(argument, 1)))

    def put(self, argument: int, value: Value) -> None:
        """A number of each lane's block."""
        self._store(self._place(argument, LANES), 0, value.value, 4)

    def put_bytes(self, argument: int, values: Sequence[Value]) -> None:
        """A block's whole numbers as bytes."""
        start = self._place(argument, LANES * len(values))
        for number, value in enumerate(values):
            whole = self.builder.fptosi(value.value, _INTS)
            self._store(start, number * LANES, self.builder.trunc(whole, _BYTES), 1)

    def variable(self, value: Value) -> Variable:
        return Variable(self, value)

    @contextmanager
    def each(self, numbers: Sequence[float]) -> Iterator[Value]:
        """A loop: its body is written once and runs for each of `numbers`."""
        kind = ir.ArrayType(_F32, len(numbers))
        table = ir.GlobalVariable(self.function.module, kind, f"{self.function.name}.numbers")
        table.initializer, table.global_constant = ir.Constant(kind, [float(number) for number in numbers]), True
        with _loop(self.function, self.builder, _I64(len(numbers))) as at:
            yield self._everywhere(self.builder.load(self.builder.gep(table, [_I64(0), at])))

    def _place(self, argument: int, count: int) -> Any:
        """Where the group's `count` numbers start."""
        return self.builder.gep(self.function.args[argument], [self.builder.mul(self.group, _I64(count))])

    def _everywhere(self, number: Any) -> Value:
        none = ir.Constant(_FLOATS, ir.Undefined)
        first = self.builder.insert_element(none, number, _I32(0))
        return Value(self, self.builder.shuffle_vector(first, none, _integers(0)))

    def _vector(self, start: Any, at: int, kind: ir.Type, align: int) -> Any:
        place = self.builder.bitcast(self.builder.gep(start, [_I64(at)]), kind.as_pointer())
        return self.builder.load(place, align=align)

    def _store(self, start: Any, at: int, value: Any, align: int) -> None:
        place = self.builder.bitcast(self.builder.gep(start, [_I64(at)]), value.type.as_pointer())
        self.builder.store(value, place, align=align)


class Variable:
    """A `Value` that a loop changes."""

    def __init__(self, code: Code, value: Value) -> None:
        self._code = code
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(_FLOATS)
        self.set(value)

    def get(self) -> Value:
        return Value(self._code, self._code.builder.load(self._place))

    def set(self, value: Value) -> None:
        self._code.builder.store(value.value, self._place)


Kernel = Callable[..., None]
Writer = Callable[[Code], None]


def compiled(kernels: Mapping[str, tuple[Writer, str]]) -> dict[str, Kernel]:
    """Each kernel as a function of addresses and the number of groups: `(address, …, groups)`; 0.1 s.

    A kernel is its writer and its arguments, a letter each: `f` an array of float32, `b` one of bytes. A call lets the
    interpreter's lock go. Raises OSError where the system lets nobody run what was made in memory.
    """
    # LLVM would end the process there.
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    module = ir.Module()
    for name, (writer, arguments) in kernels.items():
        _write(module, name, writer, arguments)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    made: dict[str, Kernel] = {}
    for name, (_, arguments) in kernels.items():
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments), ctypes.c_int64)
        function: Any = kind(engine.get_function_address(name))
        function.engine = engine  # which holds the code
        made[name] = function
    return made


def _write(module: ir.Module, name: str, writer: Writer, arguments: str) -> None:
    pointers = [{"f": _F32, "b": _I8}[letter].as_pointer() for letter in arguments]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*pointers, _I64]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    with _loop(function, builder, function.args[-1]) as group:
        writer(Code(function, builder, group))
    builder.ret_void()


@contextmanager
def _loop(function: ir.Function, builder: ir.IRBuilder, count: Any) -> Iterator[Any]:
    before = builder.block
    head, body, after = (function.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    at = builder.phi(_I64)
    at.add_incoming(_I64(0), before)
    builder.cbranch(builder.icmp_signed("<", at, count), body, after)
    builder.position_at_end(body)
    yield at
    at.add_incoming(builder.add(at, _I64(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def _integers(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * LANES)
