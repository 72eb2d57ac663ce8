"""Torch's storages and tensors, as they stand in a pickle: which bytes of which file, seen in which shape.

Written after torch/_utils.py (the `_rebuild_*` functions) and torch/storage.py (storage classes and their dtypes).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from llava_convert.core.errors import UnsafeError
from llava_convert.core.tensors import DTYPE_BITS, Extent, StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.storage.pickle.limits import MAX_NAME, Hostile
from llava_convert.storage.pickle.machine import Builder, Inert, Malformed

MAX_EXPANDED_BYTES = 64 << 30  # of one tensor that has more elements than its storage (stride 0)

# torch dtype -> the name in `spec`; torch/storage.py says which storage class stands for which.
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
# Sound, but nothing here computes with them: their tensors become `OddTensor`. Bytes an element.
_ODD_STORAGES = {
    "ComplexDoubleStorage": 16, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
    "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
_ODD_REBUILDS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta (without data)",
    "torch._utils._rebuild_wrapper_subclass": "wrapper-subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "device",
    "torch._utils._rebuild_xla_tensor": "XLA",
    "torch._utils._rebuild_mlc_tensor": "MLC",
}
_QUIET = frozenset(
    ["torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.device", "torch.layout"]
)


@dataclass(frozen=True, slots=True)
class OddTensor:
    """A tensor of a kind that is not read ("quantised", "torch.complex128", ...); no error until it is asked for."""

    kind: str


@dataclass(frozen=True, slots=True)
class LocalShard(OddTensor):
    """A rank's part of a distributed tensor: `local` of a whole of `shape`, placed on the ranks of `mesh`."""

    local: StoredTensor
    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    mesh: Any


@dataclass(frozen=True, slots=True)
class Storage:
    """A torch storage: `nbytes` at `offset` of `path`. `dtype` is None for a type outside `spec`."""

    path: Path
    type_name: str
    dtype: str | None
    item: int
    offset: int
    nbytes: int


def as_ascii(value: Any) -> Any:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def storage_id(pid: Any, length: int) -> tuple[str, str, int]:
    """Type name, key and element count of ("storage", type, key, location, count[, view])."""
    if type(pid) is not tuple or len(pid) != length or as_ascii(pid[0]) != "storage":
        raise Malformed("a persistent id that is no storage")
    if type(pid[2]) in (str, bytes) and len(pid[2]) > MAX_NAME:  # before it is decoded, as one id may be used often
        raise Hostile(f"names a storage with {len(pid[2]):,} characters")
    storage_type, key, numel = pid[1], as_ascii(pid[2]), pid[4]
    if type(storage_type) is not Inert or storage_type.args is not None or type(key) is not str:
        raise Malformed("a storage without type or key")
    if type(numel) is not int or not 0 <= numel < 1 << 63:
        raise Malformed(f"storage {printable(key)} has no sound element count")
    return storage_type.name, key, numel


def storage_at(path: Path, type_name: str, numel: int, offset: int) -> Storage:
    if not _is_storage(type_name):
        return Storage(path, type_name, None, 0, offset, 0)  # of unknown size: its tensors are odd, nothing reads it
    last = type_name.rpartition(".")[2]
    dtype = _STORAGES.get(last)
    item = _ODD_STORAGES[last] if dtype is None else DTYPE_BITS[dtype] // 8
    return Storage(path, type_name, dtype, item, offset, numel * item)


def _is_storage(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return module in ("torch", "torch.cuda", "torch.storage") and (last in _STORAGES or last in _ODD_STORAGES)


def is_quiet(name: str) -> bool:
    return name in _QUIET or name in _ODD_REBUILDS or name.removeprefix("torch.") in DTYPES or _is_storage(name)


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None) -> StoredTensor | OddTensor:
    """A tensor over a storage; offset and strides count elements, as torch's do."""
    if type(storage) is not Storage or type(size) not in (tuple, list) or type(stride) not in (tuple, list):
        raise Malformed("a tensor without storage, size or strides")
    if dtype is None:
        return OddTensor(storage.type_name)
    if len(size) != len(stride) or len(size) > 64:
        raise Malformed("a tensor whose size and strides differ in length")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (offset, *size, *stride)):
        raise Malformed("a tensor whose offset, size or stride is negative or no number")
    shape, strides = tuple(size), tuple(stride)
    item, numel = DTYPE_BITS[dtype] // 8, prod(shape)
    span = 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if numel else 0
    needed = (offset + span) * item if numel else 0
    if needed > storage.nbytes:
        raise Malformed(
            f"a tensor of shape {list(shape)} needs {needed:,} bytes of a storage that has {storage.nbytes:,}"
        )
    if numel > span and numel * item > MAX_EXPANDED_BYTES:
        raise UnsafeError(
            f"{storage.path}: a tensor of {span * item:,} bytes claims to be {numel * item:,} by repeating itself"
        )
    extent = Extent(storage.path, storage.offset + offset * item if numel else storage.offset, span * item)
    return StoredTensor("", dtype, shape, (extent,), None if _is_contiguous(shape, strides) else strides)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Row-major without gaps; as in torch, the strides of dimensions of length 1 do not matter."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if step != expected and 0 not in shape:
                return False
            expected *= length
    return True


def _rebuild_tensor(args: tuple[Any, ...]) -> Any:
    """`_rebuild_tensor(storage, offset, size, stride)` and v2, which adds requires_grad, hooks and metadata."""
    if len(args) not in (4, 6, 7):
        raise Malformed("a tensor with a wrong number of arguments")
    if len(args) == 7 and args[6]:
        return OddTensor("conjugated or negated view")
    storage = args[0]
    return _view(storage, args[1], args[2], args[3], storage.dtype if type(storage) is Storage else None)


def _rebuild_tensor_v3(args: tuple[Any, ...]) -> Any:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None): dtypes without a storage class."""
    if len(args) not in (7, 8) or type(args[6]) is not Inert:
        raise Malformed("a tensor without a dtype")
    if len(args) == 8 and args[7]:
        return OddTensor("conjugated or negated view")
    dtype = DTYPES.get(args[6].name.removeprefix("torch."))
    return OddTensor(args[6].name) if dtype is None else _view(args[0], args[1], args[2], args[3], dtype)


def _rebuild_parameter(args: tuple[Any, ...]) -> Any:
    """(data, requires_grad, hooks[, state]): a Parameter is its data."""
    if len(args) not in (3, 4):
        raise Malformed("a parameter with a wrong number of arguments")
    return args[0]


def _rebuild_from_type(args: tuple[Any, ...]) -> Any:
    """(function, type, arguments, state): a subclass of Tensor, or a tensor with attributes."""
    function, _, inner, state = args
    if type(function) is not Inert or function.args is not None or type(inner) is not tuple:
        raise Malformed("a tensor without a function that makes it")
    if function.name == "torch._utils._rebuild_wrapper_subclass":
        return _distributed(inner, state) or OddTensor("wrapper-subclass")
    builder = _TENSOR_BUILDERS.get(function.name)
    return OddTensor(function.name) if builder is None else builder(inner)


def _distributed(inner: tuple[Any, ...], state: Any) -> LocalShard | None:
    """A DTensor, whose state holds its local tensor and the spec that places it; None for another subclass."""
    kind, size = (inner[0], inner[2]) if len(inner) > 2 else (None, None)
    if type(kind) is not Inert or not kind.name.startswith("torch.distributed.") or not kind.name.endswith(".DTensor"):
        return None
    held = next((part for part in state if type(part) is dict), {}) if type(state) is tuple else state
    held = held if type(held) is dict else {}
    spec, local = held.get("_spec"), held.get("_local_tensor")
    placed = spec.state if type(spec) is Inert and type(spec.state) is dict else {}
    placements = placed.get("placements")
    if type(local) is not StoredTensor or not isinstance(placements, tuple | list) or type(size) is not tuple:
        raise Malformed("a distributed tensor without its local one, or its placements")
    if not all(type(n) is int and n >= 0 for n in size):
        raise Malformed("a distributed tensor without sizes")
    return LocalShard("distributed", local, size, tuple(placements), placed.get("mesh"))


def _odd(kind: str) -> Callable[[tuple[Any, ...]], OddTensor]:
    return lambda args: OddTensor(kind)


_TENSOR_BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    **{name: _odd(kind) for name, kind in _ODD_REBUILDS.items()},
}
BUILDERS: dict[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
}
