"""The mmengine `.pth` that xtuner's training leaves.

It is one file, or with DeepSpeed a folder of that name. It is usually partial: what was frozen is absent and comes from
the base models that the training config names. The config travels in `meta.cfg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.naming import sort_tensors
from llava_convert.layouts.training_config import load_training_config, parse_training_config
from llava_convert.model.checkpoint import LLM, PARTS, VISION, Checkpoint, Part, Settings
from llava_convert.model.tables.names import layout_table
from llava_convert.model.training import LoraSettings, TrainingConfig
from llava_convert.storage.distributed import read_distributed
from llava_convert.storage.distributed import recognise as recognise_shares
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.torch.file import StateDict, TorchFile, state_dict
from llava_convert.storage.zero.checkpoint import read_zero, recognise

NAME = "pth"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def detect(found: Found) -> str | None:
    if found.config is not None:
        return None
    if found.path.is_dir():
        # With a config at hand it may be a DeepSpeed folder of another trainer, which only its names tell.
        if (why := recognise(found.names)) is not None and not found.beside.has("config.json"):
            return why
        if recognise_shares(found.path, found.names) is None:
            return None
        names = read_distributed(found.path, found.names, found.headers).tensors
    elif found.path.suffix in _TORCH_SUFFIXES:
        names = state_dict(found.headers.torch(found.path)).tensors
    else:
        return None
    table = layout_table(NAME)
    hits = sum(table.read(name) is not None for name in names)
    return f"its tensors have xtuner's names ({hits} of {len(names)})" if hits else None


@dataclass(frozen=True)
class _Weights:
    """What a file or a folder holds, in the same words."""

    tensors: Mapping[str, StoredTensor]
    meta: Mapping[Any, Any]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stubs: tuple[str, ...]


def _read(found: Found) -> _Weights:
    path = found.path
    if path.is_dir() and recognise(found.names) is None:
        shares = read_distributed(path, found.names, found.headers)
        return _Weights(shares.tensors, {}, shares.files, shares.notes, shares.warnings, shares.stubs)
    if path.is_dir():
        zero = read_zero(path)
        state = state_dict(TorchFile(path, zero.tensors, zero.stubs, "little"))
        notes = (*zero.notes, *_unwrapped(state))
        return _Weights(state.tensors, zero.meta, zero.files, notes, zero.warnings, zero.stubs)
    file = found.headers.torch(path)
    state = state_dict(file)
    meta = file.root.get("meta") if isinstance(file.root, dict) else None
    return _Weights(state.tensors, meta if isinstance(meta, dict) else {}, (path,), _unwrapped(state), (), file.stubs)


def _unwrapped(state: StateDict) -> tuple[str, ...]:
    """What was taken off the names, but for the entry in which mmengine always keeps them."""
    return tuple(f"unwrapped {how}" for how in state.unwrapped if how != "state_dict")


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open a `.pth`, a file or a DeepSpeed folder, by its pickled indexes; no weight is read and nothing is called.

    Raises what `read_torch` and `read_zero` raise; UnsupportedError for names that xtuner's LLaVA does not have;
    InputError when the config says that a part was trained which the file lacks.
    """
    path, read = found.path, _read(found)
    table = layout_table(NAME)
    if read.tensors and not any(table.read(name) is not None for name in read.tensors):
        raise UnsupportedError(
            f"{path}: none of its {len(read.tensors)} tensors has a name of xtuner's ({printable(min(read.tensors))})",
            hint="if another trainer saved it, give its config.json and tokenizer by --config-from FOLDER",
        )
    sorted_ = sort_tensors(read.tensors, table, path)
    training, warnings = _training(read.meta, path, options)
    parts: dict[str, Part] = {}
    dropped = list(sorted_.dropped)
    for name in PARTS:
        parts[name], left = sorted_.part(name, _lora(training, name), str(path))
        dropped += left
    notes = list(read.notes)
    if training is not None:
        _refuse_incomplete(training, parts, path)
        parts = {name: _with_base(part, name, training) for name, part in parts.items()}
        if training.quantized_llm:
            notes.append("training loaded the LLM quantised; weights go with the full-precision base")
    return Checkpoint(
        layout=NAME,
        extra=sorted_.extra,
        path=path,
        root=path.parent,
        files=read.files,
        whole=False,
        beside=found.beside if found.path.is_file() else folder_sidecars(path.parent),
        parts=parts,
        settings=_settings(training),
        dropped=tuple(dropped),
        notes=tuple(notes),
        warnings=(*read.warnings, *warnings),
        training=training,
        stubs=read.stubs,
        as_written=path.is_file(),
        publish_dtype=training.publish_dtype if training is not None else "float16",
    )


def _training(meta: Mapping[Any, Any], path: Path, options: OpenOptions) -> tuple[TrainingConfig | None, list[str]]:
    if options.config is not None:
        return load_training_config(options.config), []
    text = meta.get("cfg")
    if not isinstance(text, str):
        return None, ["the checkpoint carries no training config (meta.cfg): --config gives it"]
    try:
        return parse_training_config(text, f"{path.name}: meta.cfg"), []
    except InputError as problem:
        return None, [f"the training config in the checkpoint is unreadable ({problem.message}): --config gives it"]


def _lora(training: TrainingConfig | None, part: str) -> LoraSettings | None:
    if training is None:
        return None
    return {LLM: training.llm_lora, VISION: training.visual_encoder_lora}.get(part)


def _with_base(part: Part, name: str, training: TrainingConfig) -> Part:
    base = {LLM: training.llm, VISION: training.visual_encoder}.get(name)
    return Part(part.weights, part.adapter, base)


def _settings(training: TrainingConfig | None) -> Settings:
    if training is None:
        return Settings()
    return Settings(
        select_layer=training.visual_select_layer,
        image_aspect_ratio="square" if training.pad_image_to_square is False else "pad",
        prompt_template=training.prompt_template,
        max_position_embeddings=training.max_position_embeddings,
    )


def _refuse_incomplete(training: TrainingConfig, parts: dict[str, Part], path: Path) -> None:
    """A part that was trained must be in the file: its base would silently undo the training."""
    trained = {
        LLM: (not training.freeze_llm, training.llm_lora is not None),
        VISION: (not training.freeze_visual_encoder, training.visual_encoder_lora is not None),
    }
    for name, (whole, lora) in trained.items():
        if (whole or lora) and parts[name].state == "absent":
            what = "its LoRA" if lora else "its weights"
            raise InputError(
                f"{path}: the config says that the {name.replace('_', ' ')} was trained, but the file lacks {what}",
                hint="the checkpoint is incomplete, or --config is that of another run",
            )
