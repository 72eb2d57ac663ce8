"""A PEFT adapter's folder: what its adapter_config.json says, and how one is written."""

from __future__ import annotations

from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.model.adapter import Adapter, settings_from_json
from llava_convert.model.checkpoint import (
    LLM,
    PART_WORDS,
    VISION,
)
from llava_convert.model.tables.types import read_config
from llava_convert.model.training import LoraSettings
from llava_convert.storage.sidecars import Sidecars

ADAPTER_CONFIG = "adapter_config.json"


def adapter_settings(files: Sidecars) -> LoraSettings | None:
    """The adapter's settings, None where the folder has no adapter_config.json. Raises what reading it raises."""
    config = read_adapter_config(files)
    return settings_from_json(config, files.place(ADAPTER_CONFIG)) if config is not None else None


def read_adapter_config(files: Sidecars) -> dict[str, Any] | None:
    """The object in adapter_config.json, None where there is none. Raises InputError, UnsafeError for a link out."""
    return read_config(files, ADAPTER_CONFIG) if files.has(ADAPTER_CONFIG) else None


def adapter_config(made: Artefacts, part: str, adapter: Adapter) -> dict[str, Any]:
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
