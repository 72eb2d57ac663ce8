"""glibc's allocator does as it is told, by its own account of its heaps."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, threading
from llava_convert.core import heap
if sys.argv[1] == "shared":
    heap.share()
    heap.give_large_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
together = threading.Barrier(4)

def work():
    together.wait()
    held = [libc.malloc(50_000) for _ in range(100)]
    together.wait()
    for place in held:
        libc.free(place)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def heaps(how: str) -> int:
    made = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, timeout=60)
    return made.stdout.count("<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_take_from_one_heap() -> None:
    assert heaps("shared") == 1
    assert heaps("apart") > 1
