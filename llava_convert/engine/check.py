"""Is what was written what was planned? Quick: by headers and files. Full: every byte recomputed and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from llava_convert.core.errors import MismatchError
from llava_convert.core.tensors import Extent, StoredTensor
from llava_convert.core.text import printable
from llava_convert.engine.compare import compare
from llava_convert.engine.plan import Plan
from llava_convert.engine.shards import PlannedTensor, Shard
from llava_convert.storage.files import open_regular, read_file, read_fully
from llava_convert.storage.json_files import read_json
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.torch.file import read_torch, state_dict


def check_quick(plan: Plan, folder: Path) -> None:
    """Reopen a written output by its headers. Raises MismatchError (exit 7)."""
    written = check_headers(plan.shards, folder)
    for name, data in {**plan.files, **plan.indexes}.items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == len(data)
        if not whole or read_file(path, len(data)) != data:
            raise MismatchError(f"{name} was not written whole")
    for name in plan.indexes:
        _check_index(name, folder, written)


def check_headers(shards: Iterable[Shard], folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Reopen written shards by their headers; returns the tensors of each. Raises MismatchError (exit 7)."""
    return {shard.name: _check_shard(shard, folder / shard.name) for shard in shards}


def _check_shard(shard: Shard, path: Path) -> dict[str, StoredTensor]:
    if shard.container == "torch":
        found = dict(state_dict(read_torch(path)).tensors)
    elif shard.container == "gguf":  # with its vocabulary, which takes a third of a second to parse
        for at, piece in ((0, shard.header), *shard.pieces):
            if _bytes(path, at, len(piece)) != piece:
                raise MismatchError(f"{shard.name}: its header is not the planned one")
        return {t.name: StoredTensor(t.name, t.dtype, t.shape, _extents(path, t)) for t in shard.tensors}
    else:
        found = dict(read_header(path).tensors)
    if list(sorted(found)) != sorted(t.name for t in shard.tensors):
        raise MismatchError(f"{shard.name}: its tensors are not the planned ones")
    for t in shard.tensors:
        stored = found[t.name]
        place = stored.extents[0].offset if stored.extents else t.offset
        if (stored.dtype, stored.shape) != (t.dtype, t.shape) or place != t.offset:
            raise MismatchError(
                f"{shard.name}: {printable(t.name)} is {stored.dtype} {list(stored.shape)} at {place}, "
                f"planned {t.dtype} {list(t.shape)} at {t.offset}"
            )
    return found


def _bytes(path: Path, at: int, count: int) -> bytes:
    with open_regular(path) as stream:
        stream.seek(at)
        return read_fully(stream, count, path)


def _extents(path: Path, tensor: PlannedTensor) -> tuple[Extent, ...]:
    return (Extent(path, tensor.offset, tensor.nbytes),) if tensor.nbytes else ()


def _check_index(name: str, folder: Path, written: dict[str, dict[str, StoredTensor]]) -> None:
    prefix = name.rpartition("/")[0]
    for tensor, file in read_json(folder / name)["weight_map"].items():
        if tensor not in written[f"{prefix}/{file}" if prefix else file]:
            raise MismatchError(f"{name} places {tensor} in {file}, which does not hold it")


def check_full(
    shards: Iterable[Shard],
    folder: Path,
    pool: FilePool,
    *,
    progress: Callable[[int], None],
    on_file: Callable[[str], None] = lambda _: None,
) -> dict[tuple[str, str], int]:
    """Reread both sides: copies compared directly, every op recomputed. Raises MismatchError (exit 7).

    Returns how many NaN or infinite values each tensor holds, by shard and name, where there are any.
    """
    nonfinite: dict[tuple[str, str], int] = {}
    for shard in shards:
        on_file(shard.name)
        found = compare(shard.tensors, _check_shard(shard, folder / shard.name), pool, progress=progress)
        nonfinite |= {(shard.name, name): count for name, count in found.nonfinite.items()}
        if found.differences:
            name, gap = next(iter(found.differences.items()))
            raise MismatchError(
                f"{shard.name}: {printable(name)} differs from what the source gives in {gap.elements} elements "
                f"(and {len(found.differences) - 1} more tensors)"
            )
    return nonfinite
