"""ggml's block types made and read: the one place that knows which kernels are here.

Made by `ggml_quantize_chunk`, ggml's own function in the shared object of the xllamacpp wheel (extra `llamacpp`), so
that the bytes are those of llama-quantize. It is called by ctypes: the wheel's Python side is not imported, and the
interpreter's lock is let go, so that threads run side by side. `vectorised` makes the same bytes of some types many
times as fast; it is used where it has made ggml's bytes of a sample. Without the wheel, gguf-py makes five of the types
in NumPy. Read by gguf-py alone, so that the values do not depend on what is installed.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llava_convert.core.errors import UsageError
from llava_convert.core.ggml_types import NUMBERS as TYPE_NUMBERS
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import QUANTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXTRA = "pip install 'llava-convert[llamacpp]'"

# What can be made, by its number in files. The other types need an importance matrix, or no mix of llama-quantize asks
# for them.
_MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
NUMBERS: dict[str, int] = {name: TYPE_NUMBERS[name] for name in _MADE}
BY_NUMPY = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})  # of gguf-py 0.10 and later
BY_LANES = frozenset({"Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})  # by `vectorised`
# Makes rows of float32 into blocks, in place of the bytes it is given: both contiguous, and of at least one row.
Make = Callable[["NDArray[np.float32]", "NDArray[np.uint8]"], None]
READABLE = QUANTS.keys() - {"Q1_0", "Q8_1", "Q8_K"}  # by gguf-py 0.19; the last two are never stored

_one_at_a_time = threading.Lock()  # so that threads do not compile the same


def quantize(dtype: str, rows: NDArray[np.float32], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Rows of weights, (n, columns) and contiguous, as blocks of `dtype`: (n, bytes of a row), into `out` if given.

    Every weight must be finite. Raises UsageError as `require` does, ValueError for rows that are not whole blocks.
    """
    weights, size = QUANTS[dtype]
    # Checked here, since ggml ends the whole process where it finds a fault of its caller's.
    if rows.ndim != 2 or rows.shape[1] % weights or rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise ValueError(f"{dtype} is made of contiguous rows of float32 in blocks of {weights}")
    made = (len(rows), rows.shape[1] // weights * size)
    out = np.empty(made, np.uint8) if out is None else out
    if out.shape != made or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"{dtype} of shape {rows.shape} needs contiguous bytes of shape {made}")
    make = _maker(dtype)
    if make is not None:
        if rows.size:
            make(rows, out)
        return out
    require(dtype)
    from gguf import GGMLQuantizationType, quants

    # Adding 0 makes -0 into 0: of a block that holds nothing else gguf-py gets a scale of another sign than ggml does.
    values = rows + np.float32(0) if dtype in ("Q4_0", "Q5_0") else rows
    out[:] = quants.quantize(values, GGMLQuantizationType[dtype])
    return out


def dequantize(dtype: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of a `READABLE` dtype, (n, bytes of a row), as float32: (n, columns).

    Raises UsageError where the gguf-py that is installed is too old for the type.
    """
    from gguf import GGMLQuantizationType, quants

    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values: NDArray[np.float32] = quants.dequantize(rows, GGMLQuantizationType[dtype])
    except (KeyError, NotImplementedError):
        raise UsageError(f"gguf-py cannot read {dtype}", hint="install a newer one: pip install -U gguf") from None
    return values


def require(dtype: str) -> None:
    """Raise UsageError (exit 2) when no kernel here makes `dtype`, naming what to install."""
    if dtype not in NUMBERS:
        raise UsageError(f"{dtype} is not a type that can be made; there are {', '.join(NUMBERS)}")
    if _ggml(dtype) is None and dtype not in BY_NUMPY:
        found = _place()
        why = "xllamacpp is not installed" if found is None else f"{found} holds no function of ggml's that makes it"
        raise UsageError(f"{dtype} needs ggml's own kernels: {why}", hint=f"install them: {EXTRA}")


def kernels() -> str:
    """Whose bytes the blocks have here, for reports. For another processor ggml rounds otherwise."""
    if _library() is None:
        return "gguf-py's NumPy"
    from importlib.metadata import version
    from platform import machine

    return f"ggml of xllamacpp {version('xllamacpp')} for {machine()}"


def vectorises(dtype: str) -> bool:
    """Whether `vectorised` makes this type here, if what it makes is right: told without compiling it."""
    return dtype in BY_LANES and _library() is not None and importlib.util.find_spec("llvmlite") is not None


def _maker(dtype: str) -> Make | None:
    """The fastest way here to ggml's blocks."""
    with _one_at_a_time:
        return _fastest(dtype)


@cache
def _fastest(dtype: str) -> Make | None:
    ggml = _ggml(dtype)
    lanes = ggml and _lanes(dtype, ggml)
    if not ggml or not lanes:
        return ggml
    # A library has bytes of its own where its compiler fused products and sums, as it does for some processors.
    return lanes if _made(lanes, dtype).tobytes() == _made(ggml, dtype).tobytes() else ggml


def _lanes(dtype: str, ggml: Make) -> Make | None:
    """`vectorised`, where LLVM loads and its code may run."""
    if not vectorises(dtype):
        return None
    try:
        from llava_convert.ops import vectorised

        return vectorised.maker(dtype, ggml)
    except (ImportError, OSError):  # llvmlite raises either for a library that does not load here
        return None


def _made(make: Make, dtype: str) -> NDArray[np.uint8]:
    """Blocks of a sample."""
    weights, size = QUANTS[dtype]
    rows = _sample()
    out = np.empty((len(rows), rows.shape[1] // weights * size), np.uint8)
    make(rows, out)
    return out


def _sample() -> NDArray[np.float32]:
    """Weights like those of a model, (128, 4096), the same each time. ggml takes 0.02 s for them, or 0.14 (IQ4)."""
    return np.random.default_rng(0).standard_normal((128, 4096), np.float32) * np.float32(0.02)


def _ggml(dtype: str) -> Make | None:
    """`ggml_quantize_chunk`, where the library means the same type by our number."""
    library = _library()
    if library is None or dtype not in NUMBERS:
        return None
    number, (weights, size) = NUMBERS[dtype], QUANTS[dtype]
    if library.ggml_row_size(number, weights) != size:
        return None

    def make(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
        library.ggml_quantize_chunk(number, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None)

    return make


@cache
def _library() -> ctypes.CDLL | None:
    """The wheel's shared object, loaded (10 ms); None where there is none, or one without the functions.

    Measured with xllamacpp 2026.10.11549: its load does not make threads flush subnormals to zero.
    """
    place = _place()
    if place is None:
        return None
    try:
        library = ctypes.CDLL(str(place))
        quantize_chunk, row_size = library.ggml_quantize_chunk, library.ggml_row_size
    except (OSError, AttributeError):
        return None
    # ggml.h: size_t ggml_quantize_chunk(type, const float * src, void * dst, int64_t start, int64_t nrows,
    # int64_t n_per_row, const float * imatrix). It prepares the tables of a type itself, under a lock.
    quantize_chunk.restype = row_size.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    row_size.argtypes = [ctypes.c_int, count]
    return library


def _place() -> Path | None:
    """Where the shared object lies. A top-level package's spec is found without importing it."""
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder, f"xllamacpp{suffix}")
            if file.is_file():
                return file
    return None
