"""Stored tensors as streams of row blocks, read into one small buffer that is used again and again.

Blocks of 1 MiB: each costs some 50 us of Python, and each pass over one hands the interpreter's lock over, for which
the other threads wait. A LLaVA of 4 GB in float32 took 2.5 s with them, 2.7 s with blocks of 512 KiB, and 2.5 s with
2 MiB, in more memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from llava_convert.core.arrays import Array, as_array
from llava_convert.core.later import numpy as np
from llava_convert.core.tensors import StoredTensor, Stripe, cut, nbytes_of, stripes_of
from llava_convert.storage.ranges import FilePool

BLOCK = 1024 * 1024


def columns_of(shape: tuple[int, ...]) -> int:
    return prod(shape[1:])


def rows_of(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def rows_per_block(tensor: StoredTensor, together: int = 1) -> int:
    """How many rows make a block of this tensor: a multiple of `together`."""
    row_bytes = max(1, nbytes_of(tensor.dtype, columns_of(tensor.shape)))
    return -(-max(1, BLOCK // row_bytes) // together) * together


def cuts(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    """Rows `first` to `last` in pieces of `step`, the last one shorter."""
    for row in range(first, last, step):
        yield row, min(row + step, last)


def read_bytes(pool: FilePool, tensor: StoredTensor, start: int, buffer: memoryview, *, until: int = 0) -> None:
    """Fill `buffer` with the tensor's stored bytes from `start` on, over its extents; those up to `until` follow."""
    if isinstance(tensor.extents, tuple) and len(tensor.extents) == 1:  # nearly always
        (extent,) = tensor.extents
        until = extent.offset + max(until, start + len(buffer))
        pool.read_into(extent.path, extent.offset + start, buffer, until=until)
        return
    done = 0
    for stripe in cut(tensor.extents, start, max(len(buffer), until - start)):
        ends: dict[Path, int] = {}
        for extent, step in stripe.pieces:
            end = extent.offset + (stripe.rounds - 1) * step + extent.length
            ends[extent.path] = max(end, ends.get(extent.path, 0))
        for part in stripe.between(0, min(stripe.width * stripe.rounds, len(buffer) - done)):
            size = part.width * part.rounds
            _read_stripe(pool, part, buffer[done : done + size], ends)
            done += size
        if done == len(buffer):
            return


def _read_stripe(pool: FilePool, stripe: Stripe, buffer: memoryview, ends: Mapping[Path, int]) -> None:
    """Fill `buffer` with a stripe; what follows of it in each file goes on to the byte that `ends` says.

    Pieces that lie one after another in their file are read at once, as many as make a block.
    """
    column = 0
    for extent, step in stripe.pieces:
        until = ends[extent.path]
        if stripe.rounds == 1:
            pool.read_into(extent.path, extent.offset, buffer[column : column + extent.length], until=until)
        else:
            together = max(1, BLOCK // extent.length) if step == extent.length else 1
            target = np.frombuffer(buffer, np.uint8).reshape(stripe.rounds, stripe.width)
            scratch = bytearray(min(together, stripe.rounds) * extent.length)
            for row, end in cuts(0, stripe.rounds, together):
                held = memoryview(scratch)[: (end - row) * extent.length]
                pool.read_into(extent.path, extent.offset + row * step, held, until=until)
                rows = np.frombuffer(held, np.uint8).reshape(end - row, -1)
                target[row:end, column : column + extent.length] = rows
        column += extent.length


def read_whole(pool: FilePool, tensor: StoredTensor) -> Array:
    """A tensor in memory, in its own shape and row-major order: for small ones, and views with strides."""
    raw = bytearray(sum(stripe.width * stripe.rounds for stripe in stripes_of(tensor.extents)))
    read_bytes(pool, tensor, 0, memoryview(raw))
    flat = as_array(raw, tensor.dtype, 1).reshape(-1)
    if tensor.strides is None:
        return flat.reshape(tensor.shape)
    strides = tuple(s * flat.itemsize for s in tensor.strides)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False))


def blocks(pool: FilePool, tensor: StoredTensor, first: int, last: int, together: int = 1) -> Iterator[Array]:
    """Rows `first` to `last` in blocks of (rows, columns), `together` rows never parted where `first` is a multiple.

    Each block is gone when the next is asked for.
    """
    columns, step = columns_of(tensor.shape), rows_per_block(tensor, together)
    if tensor.strides is not None:
        whole = read_whole(pool, tensor).reshape(-1, columns)
        for row, end in cuts(first, last, step):
            yield whole[row:end]
        return
    row_bytes = nbytes_of(tensor.dtype, columns)
    buffer = bytearray(min(step, last - first) * row_bytes)
    for row, end in cuts(first, last, step):
        view = memoryview(buffer)[: (end - row) * row_bytes]
        read_bytes(pool, tensor, row * row_bytes, view, until=last * row_bytes)
        yield as_array(view, tensor.dtype, columns)


def same_bytes(pool: FilePool, a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two contiguous tensors of one dtype and shape hold the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape or a.strides is not None or b.strides is not None:
        return False
    one, other = bytearray(BLOCK), bytearray(BLOCK)
    for start in range(0, a.nbytes, BLOCK):
        size = min(BLOCK, a.nbytes - start)
        read_bytes(pool, a, start, memoryview(one)[:size], until=a.nbytes)
        read_bytes(pool, b, start, memoryview(other)[:size], until=b.nbytes)
        if one[:size] != other[:size]:
            return False
    return True
