"""Memory of what comes and goes over the network, given back as it is done with."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LARGE = 256 * 1024


@cache
def give_back() -> None:
    """Have this process keep no parts of files that it has passed on: 300 MB became 180 with 2 GB that went to a store.

    glibc takes a buffer of some MB for a reason to keep all later ones, for each thread that had one; with a threshold
    that is set, it gives each back. A command has cycles looked for never: each request leaves one, with a socket and
    its buffers.
    """
    gc.enable()
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and keeps nothing
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
