"""The mmengine `.pth` that xtuner's training leaves. A source only.

It is usually partial: what was frozen is absent and comes from the base models that the training config names. The
config travels in `meta.cfg`.
"""

from __future__ import annotations

from pathlib import Path

from llava_convert.checkpoint import LLM, PARTS, VISION, Checkpoint, Part, Settings
from llava_convert.errors import InputError, UnsupportedError
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.naming import sort_tensors
from llava_convert.mapping import layout_table
from llava_convert.storage.torch_file import TorchFile, read_torch, state_dict
from llava_convert.training_config import LoraSettings, TrainingConfig, load_training_config, parse_training_config

NAME = "pth"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def detect(found: Found) -> str | None:
    if found.path.is_dir():
        if any(name.endswith("_optim_states.pt") for name in found.names):
            return "a DeepSpeed directory (*_optim_states.pt)"
        return None
    if found.path.suffix not in _TORCH_SUFFIXES:
        return None
    names = state_dict(read_torch(found.path)).tensors
    table = layout_table(NAME)
    hits = sum(table.read(name) is not None for name in names)
    return f"a torch file with xtuner's names ({hits} of {len(names)})" if hits else None


def open(path: Path, options: OpenOptions) -> Checkpoint:
    """Open a `.pth` by its pickled index; no weight is read and nothing is called.

    Raises what `read_torch` raises; UnsupportedError for DeepSpeed directories and for names that xtuner's LLaVA
    does not have; InputError when the config says that a part was trained which the file lacks.
    """
    if path.is_dir():
        raise UnsupportedError(
            f"{path} is a DeepSpeed directory, which cannot be read yet",
            hint="merge it with the zero_to_fp32.py beside it, then convert the file that it writes",
        )
    file = read_torch(path)
    state = state_dict(file)
    sorted_ = sort_tensors(state.tensors, layout_table(NAME), path)
    training, warnings = _training(file, path, options)
    parts: dict[str, Part] = {}
    dropped = list(sorted_.dropped)
    for name in PARTS:
        parts[name], left = sorted_.part(name, _lora(training, name), str(path))
        dropped += left
    notes = [f"unwrapped {how}" for how in state.unwrapped]
    if training is not None:
        _refuse_incomplete(training, parts, path)
        parts = {name: _with_base(part, name, training) for name, part in parts.items()}
        if training.quantized_llm:
            notes.append("training loaded the LLM quantised; weights go with the full-precision base")
    return Checkpoint(
        layout=NAME,
        path=path,
        root=path.parent,
        files=(path,),
        parts=parts,
        settings=_settings(training),
        dropped=tuple(dropped),
        notes=tuple(notes),
        warnings=tuple(warnings),
        training=training,
        stubs=file.stubs,
    )


def _training(file: TorchFile, path: Path, options: OpenOptions) -> tuple[TrainingConfig | None, list[str]]:
    if options.config is not None:
        return load_training_config(options.config), []
    root = file.root if isinstance(file.root, dict) else {}
    meta = root.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
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
