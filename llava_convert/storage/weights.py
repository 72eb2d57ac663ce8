"""A model's weights as one dict of tensors, however many files they lie in and whichever of two formats these have.

An index (`model.safetensors.index.json`) is what transformers writes beside shards: `weight_map` says which file
holds each tensor (transformers, utils/hub.py `get_checkpoint_shard_files`, which checks none of what is checked here).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsafeError, UnsupportedError, unreadable
from llava_convert.core.tensors import StoredTensor, require_few
from llava_convert.core.text import listed, printable
from llava_convert.core.values import dataclass
from llava_convert.storage.distributed import read_distributed, recognise
from llava_convert.storage.files import relative_name, require_inside, require_regular
from llava_convert.storage.headers import Headers
from llava_convert.storage.json_files import read_json
from llava_convert.storage.safetensors import SUFFIX as SAFETENSORS_SUFFIX

TORCH_SUFFIXES = (".bin", ".pth", ".pt")
INDEX_SUFFIX = ".index.json"
# The largest index of a real model (DeepSeek-V3, 92,000 tensors) has 9 MB.
MAX_INDEX_BYTES = 64 << 20

# transformers' names, and accelerate's for the whole state of FSDP (utils/constants.py `FSDP_MODEL_NAME`).
STEMS = ("model", "pytorch_model", "pytorch_model_fsdp")

_SHARD_NAME = re.compile(r"-(\d+)-of-(\d+)\.[a-z]+$")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name, in the order of the index or else of the file; their bytes are in `files`, within `root`.

    `shard_of` names the file of each tensor, relative to `root` with forward slashes; of shares that several processes
    saved it is empty. `warnings` and `notes` are sentences for the user.
    """

    root: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    shard_of: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is in safetensors alone, of whole tensors."""
        return bool(self.shard_of) and all(file.suffix.lower() == SAFETENSORS_SUFFIX for file in self.files)


# transformers' two, and accelerate's name for a full state dict under FSDP (accelerate/utils/constants.py).
STEMS = ("model", "pytorch_model", "pytorch_model_fsdp")


class NoWeightsError(InputError):
    """A folder without weights under a name that they have."""


def open_weights(path: Path, *, stems: Sequence[str] = STEMS, headers: Headers | None = None) -> Weights:
    """The weights at `path`: a folder, a `.safetensors` file, a torch file (`.bin`, `.pth`, `.pt`), or an index.

    In a folder they are `<stem>.safetensors` or `<stem>.bin`, or shards with an index; for an adapter pass
    `stems=("adapter_model",)`. A folder which has both formats is read from safetensors, with a warning. A folder
    without either may hold what several processes saved (`storage.distributed`). `headers` are those of the source that
    this is of, some of which may have been read.

    Raises InputError where something is missing or corrupt, or index and shards disagree (fault rows 14, 17, 24, 25,
    29, 32); UnsupportedError where it is not clear which file counts (row 26) or a format is unknown; UnsafeError
    where the index or a link leads out of the folder (rows 22, 23), or a torch file would run code.
    """
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error
    if is_folder:
        return _open_folder(path, stems, headers or Headers())
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _open_index(path.parent, path.name, _read_index(path), (), headers or Headers())
    if suffix not in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES):
        require_regular(path)  # what is missing should not be told that its suffix is unknown
        raise UnsupportedError(
            f"{printable(path)}: not known as a file of weights",
            hint=f"name a folder, an index, or a file of {SAFETENSORS_SUFFIX}, {', '.join(TORCH_SUFFIXES)}",
        )
    part = _SHARD_NAME.search(path.name)
    partial = part is not None and int(part[2]) > 1
    warnings = (
        (f"{printable(path.name)} is one shard of {part[2]}; the others are left out",) if part and partial else ()
    )
    return _open_single(path.parent, path.name, warnings, headers or Headers())


def is_weights(path: Path) -> bool:
    """Whether a file's name is that of weights, or of their index."""
    name = path.name.lower()
    return name.endswith(
        (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES, SAFETENSORS_SUFFIX + INDEX_SUFFIX, ".bin" + INDEX_SUFFIX)
    )


def index_of(shard: Path) -> Path | None:
    """The index beside one of several shards, None where there is none."""
    part = _SHARD_NAME.search(shard.name)
    if part is None or int(part[2]) < 2:
        return None
    index = shard.with_name(f"{shard.name[: part.start()]}{shard.suffix}{INDEX_SUFFIX}")
    return index if index.is_file() else None


def reject_ungathered(where: str, tensors: Iterable[StoredTensor]) -> None:
    """Raises InputError for float tensors of shape (0,), which DeepSpeed leaves of a partitioned parameter.

    (deepspeed/runtime/zero/partition_parameters.py `free_param`; fault row 17.) Other tensors without elements pass.
    """
    empty = [t.name for t in tensors if t.shape == (0,) and "F" in t.dtype]
    if empty:
        raise InputError(
            f"{where}: {len(empty):,} tensors hold no data: {listed(empty)}: a ZeRO-3 shard saved without gathering",
            hint="convert the DeepSpeed checkpoint folder itself, or save again with "
            "stage3_gather_16bit_weights_on_model_save",
        )


def _open_folder(root: Path, stems: Sequence[str], headers: Headers) -> Weights:
    try:
        names = {entry.name for entry in root.iterdir()}
    except OSError as error:
        raise unreadable(root, error, "cannot be listed") from error
    suffixes = (SAFETENSORS_SUFFIX, TORCH_SUFFIXES[0])
    found = {suffix: _candidates(names, stems, suffix) for suffix in suffixes}
    for suffix in suffixes:
        if not found[suffix]:
            _reject_lost_index(root, names, stems, suffix)
            continue
        warnings = []
        others = [name for other in suffixes if other != suffix for name in found[other]]
        if others:
            warnings.append(f"{printable(root)} has safetensors and torch files: {listed(others)} ignored")
        return _open_found(root, found[suffix], tuple(warnings), headers)
    if "adapter_model" not in stems and recognise(root, names) is not None:
        shares = read_distributed(root, names, headers)
        reject_ungathered(printable(root), shares.tensors.values())
        return Weights(root, shares.files, shares.tensors, {}, shares.warnings, shares.notes, shares.stubs)
    adapter = any(name.startswith("adapter_model.") for name in names) and "adapter_model" not in stems
    raise NoWeightsError(
        f"{printable(root)}: no weights: looked for {listed(_candidates(None, stems, *suffixes))}",
        hint="this is an adapter; it needs its base model" if adapter else "name the folder that holds the weights",
    )


def _candidates(names: set[str] | None, stems: Sequence[str], *suffixes: str) -> list[str]:
    """The names that weights may have, of those that are there when `names` are given."""
    every = [stem + suffix + end for suffix in suffixes for stem in stems for end in ("", INDEX_SUFFIX)]
    return every if names is None else [name for name in every if name in names]


def _reject_lost_index(root: Path, names: set[str], stems: Sequence[str], suffix: str) -> None:
    """Raises InputError for shards without an index: which ones make the model would be a guess."""
    for stem in stems:
        shards = sorted(n for n in names if n.startswith(f"{stem}-") and n.endswith(suffix) and _SHARD_NAME.search(n))
        if shards:
            raise InputError(
                f"{printable(root)}: shards without an index: {listed(shards)}, but no {stem}{suffix}{INDEX_SUFFIX}",
                hint=f"get {stem}{suffix}{INDEX_SUFFIX} from where the shards are from, or name one file as the source",
            )


def _open_found(root: Path, found: list[str], warnings: tuple[str, ...], headers: Headers) -> Weights:
    """Opens the one file or index that `found` leaves no doubt about."""
    maps = {name: _read_index(require_inside(root, name)) for name in found if name.endswith(INDEX_SUFFIX)}
    # An index which names only the single file beside it says nothing else than that file does.
    idle = {name for name, index in maps.items() if set(index["weight_map"].values()) == {name[: -len(INDEX_SUFFIX)]}}
    left = [name for name in found if name + INDEX_SUFFIX not in idle]
    if len(left) > 1:
        raise UnsupportedError(
            f"{printable(root)}: ambiguous: {' and '.join(left)} are both there, one of them probably stale",
            hint=f"name the file itself as the source, such as {printable(root / left[0])}, or remove the stale one",
        )
    if left[0] in maps:
        return _open_index(root, left[0], maps[left[0]], warnings, headers)
    return _open_single(root, left[0], warnings, headers, check_link=True)


def _open_single(
    root: Path, name: str, warnings: tuple[str, ...], headers: Headers, *, check_link: bool = False
) -> Weights:
    """One file. Its link is followed anywhere when the user named the file, and not when a folder did."""
    path = require_inside(root, name) if check_link else root / name
    tensors, notes = _read_file(path, headers)
    reject_ungathered(printable(path), tensors.values())
    return Weights(root, (path,), tensors, dict.fromkeys(tensors, name), (*warnings, *notes))


def _read_file(path: Path, headers: Headers) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of one file of either format, and what should be said of it."""
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        return headers.safetensors(path).tensors, []
    from llava_convert.storage.torch.file import state_dict  # most sources have no torch file

    found = state_dict(headers.torch(path))
    notes = [f"{printable(path.name)}: weights taken from within {listed(found.unwrapped)}"] if found.unwrapped else []
    return found.tensors, notes


def _read_index(path: Path) -> dict[str, Any]:
    """An index whose `weight_map` takes tensor names to file names that are plain relative paths."""
    where = printable(path)
    index = read_json(path, limit=MAX_INDEX_BYTES, unique_keys=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where}: not an index: has no object weight_map of tensor names and files")
    require_few(f"{where} (weight_map)", len(weight_map))
    plain: dict[str, str] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(f"{where}: weight_map gives {printable(tensor)} no file name but {printable(file)}")
        if file not in plain:
            relative = relative_name(file)
            if relative is None:
                raise UnsafeError(
                    f"{where}: weight_map puts {printable(tensor)} into '{printable(file)}', "
                    "which is not a file of this folder",
                    hint="an index of a model names files beside it; get it from a source that you trust",
                )
            if not relative.lower().endswith((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
                raise UnsupportedError(f"{where}: weight_map names '{printable(file)}', which is of no known format")
            plain[file] = relative
    return {**index, "weight_map": {tensor: plain[file] for tensor, file in weight_map.items()}}


def _open_index(root: Path, name: str, index: dict[str, Any], warnings: tuple[str, ...], headers: Headers) -> Weights:
    """The shards that `index` names; only these count, whatever else lies beside them and however they are called."""
    where = printable(root / name)
    weight_map: dict[str, str] = index["weight_map"]
    paths = {shard: require_inside(root, shard) for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(
            f"{where}: {len(missing)} of {len(paths)} shards are missing: {listed(missing)}",
            hint="download the missing files into the same folder",
        )
    tensors: dict[str, StoredTensor] = {}
    shard_of: dict[str, str] = {}
    notes: list[str] = []
    for shard, path in paths.items():
        held, said = _read_file(path, headers)
        notes += said
        require_few(where, len(shard_of) + len(held))
        for tensor in held:
            if tensor in shard_of:
                raise InputError(
                    f"{where}: tensor {printable(tensor)} is in two shards: {shard_of[tensor]} and {shard}"
                )
            shard_of[tensor] = shard
        tensors |= held
    _check_agreement(where, weight_map, shard_of)
    reject_ungathered(where, tensors.values())
    notes += _size_warning(where, index, sum(tensor.nbytes for tensor in tensors.values()))
    ordered = {tensor: tensors[tensor] for tensor in weight_map}
    return Weights(root, tuple(paths.values()), ordered, dict(weight_map), (*warnings, *notes))


def _check_agreement(where: str, weight_map: dict[str, str], shard_of: dict[str, str]) -> None:
    """Raises InputError unless both say the same, listing the pairs that only one of them has (fault row 25)."""
    if weight_map == shard_of:
        return
    absent = [f"{name} ({file})" for name, file in weight_map.items() if shard_of.get(name) != file]
    extra = [f"{name} ({file})" for name, file in shard_of.items() if weight_map.get(name) != file]
    sides = []
    if absent:
        sides.append(f"{len(absent):,} tensors are in the index but not in that shard: {listed(absent)}")
    if extra:
        sides.append(f"{len(extra):,} tensors are in a shard but not so in the index: {listed(extra)}")
    raise InputError(
        f"{where}: index and shards disagree: {'; '.join(sides)}",
        hint="index and shards are not of one save; get all of them again",
    )


def _size_warning(where: str, index: dict[str, Any], total: int) -> list[str]:
    """Nothing reads total_size to load a model, and converters get it wrong (fault row 28)."""
    metadata = index.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    if claimed is None or claimed == total:
        return []
    return [f"{where}: total_size says {printable(claimed)}, the tensors have {total:,} bytes; ignored"]
