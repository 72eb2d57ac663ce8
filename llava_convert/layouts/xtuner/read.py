"""xtuner's own layout: the language model at the root (or `llm_adapter/`), `projector/`, and `visual_encoder_adapter/`
or `visual_encoder/`. What was frozen is absent; nothing in the folder names the models that it came from.

`--dtype` governs the language model; projector, adapter of the tower and tower stay float32, as published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.adapter_folder import adapter_settings, read_adapter_config
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.naming import sort_tensors
from llava_convert.layouts.training_config import load_training_config
from llava_convert.model.checkpoint import (
    AS_STORED,
    LLM,
    PROJECTOR,
    VISION,
    Checkpoint,
    Dropped,
    Part,
    Settings,
)
from llava_convert.model.configs import old_flavour
from llava_convert.model.facts import LAYER, read_facts
from llava_convert.model.record import read_record
from llava_convert.model.tables.facts import CONFIG, stated_in, unknown_keys
from llava_convert.model.tables.names import layout_table
from llava_convert.model.tables.types import read_config
from llava_convert.model.training import TrainingConfig
from llava_convert.storage.files import require_inside
from llava_convert.storage.sidecars import Sidecars, folder_sidecars
from llava_convert.storage.weights import open_weights

NAME = "xtuner"
LLM_ADAPTER, VISION_ADAPTER, VISION_FOLDER, PROJECTOR_FOLDER = (
    "llm_adapter",
    "visual_encoder_adapter",
    "visual_encoder",
    "projector",
)
_FOLDERS = (LLM_ADAPTER, VISION_ADAPTER, VISION_FOLDER, PROJECTOR_FOLDER)
_CONFIG = "xtuner_config.py"
PROJECTOR_CONFIG = f"{PROJECTOR_FOLDER}/{CONFIG}"


def detect(found: Found) -> str | None:
    have = [name for name in _FOLDERS if name in found.names and (found.path / name).is_dir()]
    return f"it holds {', '.join(f'{name}/' for name in have)}" if have else None


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open every file set of the folder; a copied `xtuner_config.py` is read statically for what it names."""
    path = found.path
    tensors: dict[str, StoredTensor] = {}
    files: list[Path] = []
    warnings: list[str] = []
    sets = {"root": path} if _has_weights(found.names) else {}
    sets |= {name: require_inside(path, name) for name in _FOLDERS if (path / name).is_dir()}
    for name, folder in sets.items():
        stems = ("adapter_model",) if name.endswith("_adapter") else ("model", "pytorch_model")
        weights = open_weights(folder, stems=stems, headers=found.headers)
        tensors |= {f"{name}/{key}": tensor for key, tensor in weights.tensors.items()}
        files += weights.files
        warnings += weights.warnings
    sorted_ = sort_tensors(tensors, layout_table(NAME), path)
    training, record = _training(path, options), read_record(found.beside)
    dropped: list[Dropped] = list(sorted_.dropped)
    parts: dict[str, Part] = {}
    said: dict[str, Any] = {}
    for name, adapter, folder in (
        (LLM, LLM_ADAPTER, path),
        (VISION, VISION_ADAPTER, path / VISION_FOLDER),
        (PROJECTOR, None, path / PROJECTOR_FOLDER),
    ):
        adapter_files = folder_sidecars(path / adapter) if adapter else None
        settings = adapter_settings(adapter_files) if adapter_files is not None else None
        part, left = sorted_.part(name, settings, str(path))
        dropped += left
        beside = None
        if part.weights:
            beside = found.beside if folder == path else folder_sidecars(folder)
        config = old_flavour(read_config(beside, CONFIG)) if beside is not None and name != PROJECTOR else None
        if name == LLM and config is not None:
            said |= read_facts(NAME, config, str(path / CONFIG))
            config = {key: value for key, value in config.items() if key not in stated_in(NAME)}
        parts[name] = Part(part.weights, part.adapter, _base(adapter_files, name, training), config, beside)
    projector = _projector_config(path)
    said |= read_facts(NAME, projector, str(path / PROJECTOR_CONFIG), file=PROJECTOR_CONFIG)
    return Checkpoint(
        layout=NAME,
        extra=sorted_.extra,
        path=path,
        root=path,
        files=tuple(files),
        beside=found.beside,
        parts=parts,
        settings=_settings(training, record, said),
        dropped=tuple(dropped),
        warnings=tuple(warnings),
        training=training,
        record=record,
        whole=False,
        publish_dtype=AS_STORED,
        unknown_keys={
            key: projector[key] for key in unknown_keys(projector, (PROJECTOR,), stated_in(NAME, PROJECTOR_CONFIG))
        },
    )


def _projector_config(path: Path) -> dict[str, Any]:
    """What projector/config.json says, nothing where there is none."""
    if not (path / PROJECTOR_FOLDER).is_dir():
        return {}
    files = folder_sidecars(path / PROJECTOR_FOLDER)
    return read_config(files, CONFIG) if files.has(CONFIG) else {}


def _has_weights(names: Iterable[str]) -> bool:
    return any(
        n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin", ".json")) for n in names
    )


def _training(path: Path, options: OpenOptions) -> TrainingConfig | None:
    if options.config is None and not (path / _CONFIG).is_file():
        return None
    return load_training_config(options.config or require_inside(path, _CONFIG))


def _settings(training: TrainingConfig | None, record: Mapping[str, Any] | None, said: Mapping[str, Any]) -> Settings:
    """How the parts work together: what the folder itself does not say, a training config or the record does."""
    if training is None:
        return Settings.of({**Settings.recorded(record).facts, **said})
    return Settings.of({LAYER: training.visual_select_layer, **said}, prompt_template=training.prompt_template)


def _base(adapter: Sidecars | None, part: str, training: TrainingConfig | None) -> str | None:
    """The base model of a part: what its adapter names, else what the training config names."""
    config = read_adapter_config(adapter) if adapter is not None else None
    if config and (name := config.get("base_model_name_or_path")):
        return str(name)
    if training is None:
        return None
    return {LLM: training.llm, VISION: training.visual_encoder}.get(part)
