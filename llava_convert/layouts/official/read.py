"""The official LLaVA layout (haotian-liu/LLaVA): one set of shards and a flat config.

Its loader takes the tower from the checkpoint only with `unfreeze_mm_vision_tower`; without the flag a trained tower
is silently replaced by the published one. The flag is written whenever the tower is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.adapter_folder import adapter_settings, read_adapter_config
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.configs import old_flavour
from llava_convert.model.record import read_record
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.names import layout_table
from llava_convert.storage.files import require_inside
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.weights import open_weights

NAME = "official"
PROJECTOR_FILE = "mm_projector.bin"
# What LLaVA adds to a text model's config.
_OWN_KEYS = (
    "mm_",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "freeze_mm",
    "tune_mm",
    "unfreeze_mm",
    "use_mm_proj",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "image_crop_resolution",
    "image_split_resolution",
)
_NEITHER = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type")


def detect(found: Found) -> str | None:
    if found.path.is_file():
        return "it is LLaVA's projector alone" if found.path.name == PROJECTOR_FILE else None
    if "non_lora_trainables.bin" in found.names:
        return "it is official LLaVA's LoRA form (non_lora_trainables.bin)"
    if found.config is not None and any(key in found.config for key in _NEITHER):
        return f"its config.json is that of a {found.config.get('model_type')} with mm_vision_tower"
    if PROJECTOR_FILE in found.names:
        return f"it is LLaVA's projector alone ({PROJECTOR_FILE})"
    return None


def open(path: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of shards, a LoRA folder with non_lora_trainables.bin, or a projector alone.

    Raises what the readers raise; UnsupportedError for names that the layout does not have.
    """
    folder = path if path.is_dir() else path.parent
    beside = folder_sidecars(folder)
    config = old_flavour(beside.read_object("config.json")) if beside.has("config.json") else None
    tensors, files, warnings = _weights(path)
    sorted_ = sort_tensors(tensors, layout_table(NAME), path)
    adapter, lora = read_adapter_config(folder), adapter_settings(folder)
    parts: dict[str, Part] = {}
    dropped = list(sorted_.dropped)
    for name in (LLM, VISION, PROJECTOR):
        parts[name], left = sorted_.part(name, lora if name == LLM else None, str(path))
        dropped += left
    text, own = _split(config)
    base = str(own.get("_name_or_path") or "") or (_lora_base(adapter) if adapter else None)
    has_llm = parts[LLM].state == "full"
    parts[LLM] = Part(
        parts[LLM].weights,
        parts[LLM].adapter,
        None if has_llm else base,
        text if has_llm else None,
        beside if has_llm else None,
    )
    parts[VISION] = Part(parts[VISION].weights, parts[VISION].adapter, own.get("mm_vision_tower"))
    return Checkpoint(
        layout=NAME,
        path=path,
        root=folder,
        files=files,
        parts=parts,
        settings=_settings(own),
        image_newline=sorted_.image_newline,
        dropped=tuple(dropped),
        warnings=warnings,
        record=read_record(folder),
        whole=has_llm,
    )


def _weights(path: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...], tuple[str, ...]]:
    if path.is_file():
        found = open_weights(path)
        return dict(found.tensors), found.files, found.warnings
    names = {p.name for p in path.iterdir()}
    if "non_lora_trainables.bin" in names:
        sets = [
            open_weights(require_inside(path, "non_lora_trainables.bin")),
            open_weights(path, stems=("adapter_model",)),
        ]
    elif PROJECTOR_FILE in names and not any(n.startswith(("model", "pytorch_model")) for n in names):
        sets = [open_weights(require_inside(path, PROJECTOR_FILE))]
    else:
        sets = [open_weights(path)]
    tensors: dict[str, StoredTensor] = {}
    for found in sets:
        tensors.update(found.tensors)
    return (
        tensors,
        tuple(f for s in sets for f in s.files),
        tuple(w for s in sets for w in s.warnings),
    )


def _lora_base(adapter: Mapping[str, Any]) -> str | None:
    base = adapter.get("base_model_name_or_path")
    return str(base) if base else None


def _split(config: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The text model's config, and LLaVA's own keys."""
    if config is None:
        return None, {}
    text = {k: v for k, v in config.items() if not k.startswith(_OWN_KEYS)}
    kind = str(config.get("model_type"))
    text["model_type"] = _text_type(kind)
    own = {k: v for k, v in config.items() if k.startswith(_OWN_KEYS)}
    own["_name_or_path"] = config.get("_name_or_path")
    return text, own


def _text_type(kind: str) -> str:
    for table in architectures().values():
        if table.official and kind in (table.official, *table.forks):
            return table.model_types[0]
    raise UnsupportedError(f"official LLaVA with model_type {kind!r} is not known")


def _settings(own: Mapping[str, Any]) -> Settings:
    merge = own.get("mm_patch_merge_type", "flat")
    ratio = own.get("image_aspect_ratio", "square")
    extra = {k: v for k, v in own.items() if k in ("image_grid_pinpoints", "mm_patch_merge_type")}
    return Settings(
        select_layer=own.get("mm_vision_select_layer", -2),
        select_strategy="full" if own.get("mm_vision_select_feature") == "cls_patch" else "default",
        image_aspect_ratio=ratio,
        extra=extra if merge != "flat" else {},
    )
