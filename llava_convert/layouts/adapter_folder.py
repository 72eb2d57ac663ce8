"""A PEFT adapter's folder: what its adapter_config.json says and what its tensors are, and how one is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Found
from llava_convert.layouts.naming import Sorted, sort_tensors
from llava_convert.model.adapter import Adapter, parse_adapter, settings_from_json, split_tail
from llava_convert.model.checkpoint import (
    LLM,
    PART_WORDS,
    PARTS,
    VISION,
    Dropped,
)
from llava_convert.model.tables.facts import CONFIG
from llava_convert.model.tables.names import LayoutTable, grouped, layout_table
from llava_convert.model.tables.types import read_config
from llava_convert.model.training import LoraSettings
from llava_convert.storage.headers import Headers
from llava_convert.storage.sidecars import Sidecars, folder_sidecars
from llava_convert.storage.weights import open_weights
from llava_convert.storage.zero.folder import LATEST

ADAPTER_CONFIG = "adapter_config.json"
STEM = "adapter_model"
# What peft puts before the names of the model that it wraps.
PREFIX = "base_model.model."
# Whose names the wrapped model may have had: a table, and what it has before the names of a part alone.
_WRAPPED = (("hf", ""), ("parts", f"{PART_WORDS[LLM]}/"), ("parts", f"{PART_WORDS[VISION]}/"), ("official", ""))


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a folder of these files holds an adapter: its weights, and what says how they count."""
    held = set(names)
    weights = {f"{STEM}{suffix}{end}" for suffix in (".safetensors", ".bin") for end in ("", ".index.json")}
    return ADAPTER_CONFIG in held and bool(held & weights)


def trained_beside(found: Found) -> Mapping[str, StoredTensor]:
    """What was trained beside an adapter and is in the DeepSpeed folder of the same checkpoint alone.

    Official LLaVA saves its projector so while a LoRA training runs. Raises what reading such a folder raises.
    """

    def read() -> Mapping[str, StoredTensor]:
        if not is_adapter(found.names) or LATEST not in found.names:
            return {}
        from llava_convert.storage.zero.checkpoint import read_zero  # few sources have one

        zero = read_zero(found.path)
        return {name: tensor for name, tensor in zero.tensors.items() if name in zero.trained and ".lora_" not in name}

    return found.beside.once(trained_beside, read)


def config_of_run(found: Found) -> Mapping[str, Any] | None:
    """The config.json of the run that an adapter without one is a checkpoint of, None where it is of no such run.

    Both name the model that the run began with: its trainer copies the name from the one to the other
    (`_name_or_path`, `base_model_name_or_path`). Raises InputError for a broken one.
    """

    def read() -> Mapping[str, Any] | None:
        if not is_adapter(found.names) or CONFIG in found.names:
            return None
        around = folder_sidecars(found.path.absolute().parent)
        config = around.read_json(CONFIG) if around.has(CONFIG) else None
        base = (read_adapter_config(found.beside) or {}).get("base_model_name_or_path")
        of_run = isinstance(config, dict) and base and config.get("_name_or_path") == base
        return config if of_run else None

    return found.beside.once(config_of_run, read)


@dataclass(frozen=True)
class AdapterFolder:
    """The adapters in one folder, by part. `base` names the model that they were trained on."""

    adapters: Mapping[str, Adapter]
    base: str | None
    files: tuple[Path, ...]
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...]


def read_adapter_folder(folder: Path, beside: Sidecars, headers: Headers | None = None) -> AdapterFolder:
    """What peft saved of a whole LLaVA, or of one part alone, under the names of whichever release trained it.

    Raises UnsupportedError (exit 4) for tensors that belong to no module of a LLaVA; else what reading raises.
    """
    config = read_adapter_config(beside) or {}
    settings = settings_from_json(config, beside.place(ADAPTER_CONFIG)) if config else None
    weights = open_weights(folder, stems=(STEM,), headers=headers)
    sorted_ = _sorted({_unwrapped(name): tensor for name, tensor in weights.tensors.items()}, folder)
    found: dict[str, Adapter] = {}
    dropped = list(sorted_.dropped)
    for part in PARTS:
        tensors = {**sorted_.weights[part], **sorted_.adapters[part]}
        if tensors:
            found[part], left = parse_adapter(tensors, settings, str(folder), sorted_.paths)
            dropped += [Dropped(name, reason) for name, reason in left.items()]
    base = config.get("base_model_name_or_path")
    warnings = (*weights.warnings, *_lost_biases(settings, weights.tensors))
    return AdapterFolder(found, str(base) if base else None, weights.files, tuple(dropped), warnings)


def _lost_biases(settings: LoraSettings | None, names: Iterable[str]) -> tuple[str, ...]:
    """peft 0.12 trains the biases of adapted modules, and then saves none of them (get_peft_model_state_dict)."""
    if settings is None or settings.bias == "none" or any(name.endswith(".bias") for name in names):
        return ()
    return (
        f"{ADAPTER_CONFIG} says bias: {settings.bias}, and the adapter holds no bias: older releases of peft do not "
        "save them, and the base's are taken",
    )


def _unwrapped(name: str) -> str:
    while name.startswith(PREFIX):  # twice, where a model was wrapped twice
        name = name.removeprefix(PREFIX)
    return name


def _sorted(tensors: Mapping[str, StoredTensor], folder: Path) -> Sorted:
    """By the table that takes every name. Raises UnsupportedError (exit 4), by the one that takes most."""
    tried = [(layout_table(name), prefix) for name, prefix in _WRAPPED]
    unknown, table, prefix = min(((_strange(tensors, *pair), *pair) for pair in tried), key=lambda found: len(found[0]))
    if unknown:
        raise UnsupportedError(
            f"{folder}: {len(unknown)} of {len(tensors)} tensors belong to no module of a LLaVA: {grouped(unknown)}",
            hint="give an adapter of a LLaVA, or of its language model or vision tower alone",
        )
    sorted_ = sort_tensors({prefix + name: tensor for name, tensor in tensors.items()}, table, folder)
    paths = {module: path.removeprefix(prefix) for module, path in sorted_.paths.items()}
    return replace(sorted_, paths=paths)


def _strange(tensors: Iterable[str], table: LayoutTable, prefix: str) -> list[str]:
    names = [(name, prefix + split_tail(name)[0]) for name in tensors]
    return [name for name, bare in names if table.read(bare) is None and table.dropped(bare) is None]


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
    return peft_config(
        alpha_pattern=dict(settings.alpha_pattern),
        auto_mapping=_TOWER_CLASS if part == VISION else None,
        base_model_name_or_path=made.id_of(part)[0],
        bias=settings.bias,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=settings.other.get("lora_dropout", 0.0),
        modules_to_save=list(settings.modules_to_save) if settings.modules_to_save else None,
        r=settings.r or first.rank,
        rank_pattern=dict(settings.rank_pattern),
        target_modules=modules,
        task_type="CAUSAL_LM" if part == LLM else None,
        use_dora=any(module.magnitude is not None for module in adapter.modules.values()),
        use_rslora=settings.use_rslora,
    )


_TOWER_CLASS = {
    "base_model_class": "CLIPVisionModel",
    "parent_library": "transformers.models.clip.modeling_clip",
}


def peft_config(**said: Any) -> dict[str, Any]:
    """adapter_config.json with these keys, and what peft 0.12 writes of the others."""
    rest = {
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
    }
    return dict(sorted({**rest, **said}.items()))
