"""xtuner's own layout: the language model at the root (or `llm_adapter/`), `projector/`, and `visual_encoder_adapter/`
or `visual_encoder/`. What was frozen is absent; nothing in the folder names the models that it came from.

`--dtype` governs the language model; projector, adapter of the tower and tower stay float32, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import InputError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import to_json
from llava_convert.layouts import single_part as single
from llava_convert.layouts.base import Found, Needs, OpenOptions
from llava_convert.layouts.defaults import output_dtype
from llava_convert.layouts.naming import adapter_outputs, outputs, sort_tensors
from llava_convert.layouts.training_config import load_training_config
from llava_convert.model.adapter import Adapter, settings_from_json
from llava_convert.model.checkpoint import (
    LLM,
    PART_WORDS,
    PARTS,
    PROJECTOR,
    VISION,
    Checkpoint,
    Dropped,
    Part,
    Settings,
)
from llava_convert.model.configs import old_flavour
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Model
from llava_convert.model.record import read_record
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target
from llava_convert.model.training import LoraSettings, TrainingConfig
from llava_convert.storage.files import require_inside
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.weights import open_weights

NAME = "xtuner"
LLM_ADAPTER, VISION_ADAPTER, VISION_FOLDER, PROJECTOR_FOLDER = (
    "llm_adapter",
    "visual_encoder_adapter",
    "visual_encoder",
    "projector",
)
_FOLDERS = (LLM_ADAPTER, VISION_ADAPTER, VISION_FOLDER, PROJECTOR_FOLDER)
_CODE = Path(__file__).parent / "projector_code"
_FIXED = "F32"
_CONFIG, _ADAPTER_CONFIG = "xtuner_config.py", "adapter_config.json"


def detect(found: Found) -> str | None:
    have = [name for name in _FOLDERS if name in found.names and (found.path / name).is_dir()]
    return f"it holds {', '.join(f'{name}/' for name in have)}" if have else None


def open(path: Path, options: OpenOptions) -> Checkpoint:
    """Open every file set of the folder; a copied `xtuner_config.py` is read statically for what it names."""
    tensors: dict[str, StoredTensor] = {}
    files: list[Path] = []
    warnings: list[str] = []
    sets = {"root": path} if _has_weights(path) else {}
    sets |= {name: require_inside(path, name) for name in _FOLDERS if (path / name).is_dir()}
    for name, folder in sets.items():
        stems = ("adapter_model",) if name.endswith("_adapter") else ("model", "pytorch_model")
        found = open_weights(folder, stems=stems)
        tensors |= {f"{name}/{key}": tensor for key, tensor in found.tensors.items()}
        files += found.files
        warnings += found.warnings
    sorted_ = sort_tensors(tensors, layout_table(NAME), path)
    training, record = _training(path, options), read_record(path)
    dropped: list[Dropped] = list(sorted_.dropped)
    parts: dict[str, Part] = {}
    for name, adapter, folder in (
        (LLM, LLM_ADAPTER, path),
        (VISION, VISION_ADAPTER, path / VISION_FOLDER),
        (PROJECTOR, None, path / PROJECTOR_FOLDER),
    ):
        settings = _settings_of(path / adapter) if adapter else None
        part, left = sorted_.part(name, settings, str(path))
        dropped += left
        own = folder if part.weights else None
        beside = folder_sidecars(own) if own is not None else None
        config = old_flavour(beside.read_object("config.json")) if beside is not None and name != PROJECTOR else None
        parts[name] = Part(part.weights, part.adapter, _base(path, adapter, name, training), config, beside)
    return Checkpoint(
        layout=NAME,
        path=path,
        root=path,
        files=tuple(files),
        parts=parts,
        settings=_settings(training, record),
        dropped=tuple(dropped),
        warnings=tuple(warnings),
        training=training,
        record=record,
    )


def _has_weights(path: Path) -> bool:
    names = (p.name for p in path.iterdir())
    return any(
        n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin", ".json")) for n in names
    )


def _training(path: Path, options: OpenOptions) -> TrainingConfig | None:
    if options.config is None and not (path / _CONFIG).is_file():
        return None
    return load_training_config(options.config or require_inside(path, _CONFIG))


def _settings(training: TrainingConfig | None, record: Mapping[str, Any] | None) -> Settings:
    """How the parts work together: the layout itself does not say."""
    if training is None:
        return Settings.recorded(record)
    return Settings(select_layer=training.visual_select_layer, prompt_template=training.prompt_template)


def _settings_of(folder: Path) -> LoraSettings | None:
    config = _adapter_config_in(folder)
    return settings_from_json(config, folder / _ADAPTER_CONFIG) if config is not None else None


def _adapter_config_in(folder: Path) -> dict[str, Any] | None:
    files = folder_sidecars(folder)
    return files.read_object(_ADAPTER_CONFIG) if files.has(_ADAPTER_CONFIG) else None


def _base(path: Path, adapter: str | None, part: str, training: TrainingConfig | None) -> str | None:
    """The base model of a part: what its adapter names, else what the training config names."""
    config = _adapter_config_in(path / adapter) if adapter else None
    if config and (name := config.get("base_model_name_or_path")):
        return str(name)
    if training is None:
        return None
    return {LLM: training.llm, VISION: training.visual_encoder}.get(part)


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    wanted = PARTS if part == ALL else (part,)
    whole = tuple(p for p in wanted if checkpoint.parts[p].state == "full")
    configs = tuple(p for p in whole if p != PROJECTOR)
    lora = tuple(p for p in wanted if checkpoint.parts[p].state == "lora")
    return Needs(whole, configs, lora)


def lower(model: Model, options: TargetOptions) -> Target:
    """One file set a part; raises InputError when the checkpoint holds none of the asked parts."""
    made = Artefacts(model, options)
    dtype = output_dtype(model, options)
    checkpoint = model.checkpoint
    sets: list[FileSet] = []
    files: dict[str, bytes] = {}
    named: list[str] = []
    for part in PARTS if options.part == ALL else (options.part,):
        adapter = checkpoint.parts[part].adapter
        if adapter is not None:
            folder, kind = (LLM_ADAPTER, dtype) if part == LLM else (VISION_ADAPTER, _FIXED)
            sets.append(FileSet(adapter_outputs(adapter, part, kind), folder, "adapter_model", _limit()))
            files[f"{folder}/adapter_config.json"] = to_json(_adapter_config(made, part, adapter))
            named.append(part)
        elif not model.part(part):
            continue
        elif part == LLM:
            sets.append(single.llm_files(model, options, dtype))
            files |= single.llm_artefacts(model, made, dtype)
            named.append(part)
        elif part == VISION:
            sets.append(single.vision_files(model, options, _FIXED, VISION_FOLDER))
            files |= single.vision_artefacts(model, made, _FIXED, VISION_FOLDER)
            named.append(part)
        else:
            tensors = outputs(model.part(PROJECTOR), layout_table(NAME), _FIXED, prefix="projector/")
            sets.append(FileSet(tensors, PROJECTOR_FOLDER, limit=_limit()))
            files |= _projector_files(model)
    if not sets:
        words = PART_WORDS[options.part] if options.part != ALL else "parts"
        raise InputError(
            f"the checkpoint holds no trained {words}: the xtuner layout leaves frozen parts out",
            hint="convert to official or hf, which carry the base model's weights",
        )
    return Target(NAME, tuple(sets), files, warnings=made.warnings(*named))


def _limit() -> int:
    # Adapters and projector are read as one file.
    return 1 << 62


def _projector_files(model: Model) -> dict[str, bytes]:
    sizes = projector_config({name: recipe.tensor for name, recipe in model.part(PROJECTOR).items()})
    config = {
        "architectures": ["ProjectorModel"],
        "auto_map": {
            "AutoConfig": "configuration_projector.ProjectorConfig",
            "AutoModel": "modeling_projector.ProjectorModel",
        },
        "bias": sizes["bias"],
        "depth": sizes["depth"],
        "hidden_act": "gelu",
        "llm_hidden_size": sizes["text_hidden_size"],
        "model_type": "projector",
        "torch_dtype": "float32",
        "visual_hidden_size": sizes["vision_hidden_size"],
    }
    files = {f"{PROJECTOR_FOLDER}/config.json": to_json(config)}
    for name in ("configuration_projector.py", "modeling_projector.py"):
        files[f"{PROJECTOR_FOLDER}/{name}"] = (_CODE / name).read_bytes()
    return files


def _adapter_config(made: Artefacts, part: str, adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json as peft writes it, less what it computes anew; names sorted, so that bytes are stable."""
    settings = adapter.settings or LoraSettings(r=0, lora_alpha=0)
    modules = sorted({name.rpartition(".")[2] for name in adapter.modules})
    first = next(iter(adapter.modules.values()))
    asked = made.options.lora_alpha.get(PART_WORDS[part])
    alpha = settings.lora_alpha if asked is None else asked
    adapter.scale(next(iter(adapter.modules)), alpha=asked)  # refuses an alpha that nobody knows
    config: dict[str, Any] = {
        "alpha_pattern": dict(settings.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": made.id_of(part)[0],
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings.other.get("lora_dropout", 0.0),
        "modules_to_save": list(settings.modules_to_save) if settings.modules_to_save else None,
        "peft_type": "LORA",
        "r": settings.r or first.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "revision": None,
        "target_modules": modules,
        "task_type": "CAUSAL_LM" if part == LLM else None,
        "use_dora": any(module.magnitude is not None for module in adapter.modules.values()),
        "use_rslora": settings.use_rslora,
    }
    if part == VISION:
        config["auto_mapping"] = {
            "base_model_class": "CLIPVisionModel",
            "parent_library": "transformers.models.clip.modeling_clip",
        }
    return config
