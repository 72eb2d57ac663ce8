"""NumPy's BLAS kept to one thread a product while our own threads share out the work."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# OpenBLAS as NumPy's wheels carry it, by their age, and as distributions build it.
_PREFIXES = (("scipy_openblas_", "64_"), ("openblas_", "64_"), ("openblas_", ""))
_lock = threading.Lock()
_users = 0
_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Have each product made by the thread that asks for it, in the whole process; the last user restores what was.

    A product that OpenBLAS shares out is cut by the number of its threads. Another BLAS keeps its threads: the sums of
    an element are no longer for that, and OpenBLAS gave the same bits with 1, 2 and 7 threads at every shape tried.
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _threads()[0]()
            _threads()[1](1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _threads()[1](_before)


@cache
def _threads() -> tuple[Callable[[], int], Callable[[int], object]]:
    """How OpenBLAS tells its number of threads and is told it; for another BLAS, functions that do nothing."""
    import numpy  # noqa: F401  all of it first: threads that import parts of it at once get halves of it
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)  # finds what is linked into it too
    for prefix, suffix in _PREFIXES:
        tell = getattr(library, f"{prefix}get_num_threads{suffix}", None)
        set_to = getattr(library, f"{prefix}set_num_threads{suffix}", None)
        if tell is not None and set_to is not None:
            set_to.restype = None
            return tell, set_to
    return lambda: 1, lambda count: None
