"""What an op is: a frozen value that knows what comes out, and turns a stream of row blocks into another.

So no tensor is held whole. A block is a 2-D array: rows are the tensor's first dimension, columns all the others; a 1-D
tensor is one column. Rows of a quantised tensor are their bytes. An op never writes into the blocks it is given: other
ops may read them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from llava_convert.core.arrays import Array
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass

Blocks = Iterator[Array]
Read = Callable[[StoredTensor], Array]
"""Reads a small tensor whole, in its own shape."""


@dataclass(slots=True)
class CastLoss:
    """What a cast lost: finite values that became infinite, nonzero values that became zero."""

    overflowed: int = 0
    flushed: int = 0
    nonfinite: int = 0

    def add(self, other: CastLoss) -> None:
        self.overflowed += other.overflowed
        self.flushed += other.flushed
        self.nonfinite += other.nonfinite


@dataclass(slots=True)
class Context:
    """What an op needs from the executor: small tensors read whole, and where losses are counted."""

    read: Read
    loss: CastLoss
    first_row: int = 0
    name: str = ""  # of the tensor that is made, for messages


class Op(Protocol):
    """One step. `name` is what plans and reports call it."""

    @property
    def name(self) -> str: ...

    def result(self, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of what comes out."""
        ...

    def rows_together(self, shape: tuple[int, ...]) -> int:
        """How many rows, from a multiple of that number on, must lie in one block; 0: the tensor is one stream.

        Where it is not 0, each block in gives one block out with as many rows, so that rows can be shared out to
        threads and several ops can follow one stream.
        """
        ...

    def stream(self, blocks: Blocks, dtype: str, shape: tuple[int, ...], context: Context) -> Blocks:
        """Turn the blocks from row `context.first_row` on into what comes out."""
        ...

    def inputs(self) -> tuple[StoredTensor, ...]:
        """The tensors that the op reads beside the one it transforms."""
        ...

    def inverse(self, dtype: str, shape: tuple[int, ...]) -> Op | None:
        """The op which undoes this one on an input of that dtype and shape, or None when it is lossy."""
        ...

    def describe(self) -> dict[str, Any]:
        """The op as plain data, for the plan's hash and for conversion.json."""
        ...
