"""Files of torch.save that are larger than memory: torch lays them out as holes, then the data are streamed in.

`skip_data` leaves out the bytes of every storage, and `torch.load` of fake tensors tells where they belong
(docs: torch.serialization.skip_data, and `_checkpoint_offset` in torch/storage.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from benchmarks.make import DTYPES, Values

CODES = {dtype: code for code, dtype in DTYPES.items()}


@contextmanager
def hollow() -> Iterator[None]:
    """Within, tensors have no memory and torch.save leaves a hole for each."""
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        yield


def where(path: Path) -> Any:
    """What a file holds, its tensors without memory."""
    with FakeTensorMode():
        return torch.load(path, weights_only=True)


def offset(tensor: torch.Tensor) -> int:
    """Where in its file the data of a tensor of `where` begin."""
    begin = tensor.untyped_storage()._checkpoint_offset
    if begin is None:
        raise ValueError("torch.load did not say where the tensor lies")
    return begin + int(tensor.storage_offset()) * tensor.itemsize


def fill(path: Path, chosen: Callable[[Any], Iterable[torch.Tensor]]) -> None:
    """Stream values into the tensors that `chosen` takes out of the file's tree; the others stay holes."""
    values: dict[torch.dtype, Values] = {}
    tree = where(path)
    with path.open("r+b", buffering=0) as file:
        for tensor in chosen(tree):
            if tensor.dtype not in values:
                values[tensor.dtype] = Values(CODES[tensor.dtype])
            file.seek(offset(tensor))
            for piece in values[tensor.dtype].pieces(tensor.numel()):
                write_all(file, piece)


def write_all(file: Any, piece: torch.Tensor) -> None:
    """An unbuffered write may stop early."""
    left = piece.view(torch.uint8).numpy().data
    while left:
        left = left[file.write(left) :]
