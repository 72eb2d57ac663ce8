"""The official LLaVA layout (haotian-liu/LLaVA): one set of shards and a flat config.

Its loader takes the tower from the checkpoint only with `unfreeze_mm_vision_tower`; without the flag a trained tower
is silently replaced by the published one. The flag is written whenever the tower is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.text import listed, printable
from llava_convert.layouts.adapter_folder import (
    ADAPTER_CONFIG,
    PREFIX,
    STEM,
    adapter_settings,
    config_of_run,
    is_adapter,
    read_adapter_config,
    trained_beside,
)
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.naming import sort_tensors
from llava_convert.model.adapter import Adapter
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION, Checkpoint, Part, Settings
from llava_convert.model.configs import kinds_that_fit, old_flavour
from llava_convert.model.facts import read_facts
from llava_convert.model.record import read_record
from llava_convert.model.tables.facts import CONFIG, key_table, stated_in, unknown_keys
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.names import layout_table
from llava_convert.model.tables.types import read_config
from llava_convert.storage.files import require_inside
from llava_convert.storage.sidecars import Sidecars, folder_sidecars
from llava_convert.storage.torch.file import state_dict
from llava_convert.storage.weights import Weights, open_weights

NAME = "official"
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
# What whole weights are called: the last is the name that transformers' script of conversion asks for.
STEMS = ("model", "pytorch_model", "model_state_dict")
_PROJECTOR = ".mm_projector."
# How LLaVA's own keys begin, those that no table has among them.
_OWN_KEYS = ("mm_", "image_")
# LLaVA-NEXT's code hands on every patch of these, and never looks at mm_vision_select_feature (siglip_encoder.py). The
# llava package itself cannot load them.
EVERY_PATCH = ("siglip_vision_model",)
_TRAINED = ("unfreeze_mm_vision_tower", "unfreeze_vision_tower", "tune_vit_layer", "tune_entire_model")
_NEITHER = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type")


def detect(found: Found) -> str | None:
    if found.path.is_file() and found.config is None:
        return "it is LLaVA's projector alone" if _is_projector(found) else None
    if NON_LORA in found.names:
        return f"it is official LLaVA's LoRA form ({NON_LORA})"
    if found.config is not None and any(key in found.config for key in _NEITHER):
        return f"its config.json is that of a {found.config.get('model_type')} with mm_vision_tower"
    if PROJECTOR_FILE in found.names:
        return f"it is LLaVA's projector alone ({PROJECTOR_FILE})"
    if any(_PROJECTOR in name for name in trained_beside(found)):
        return "it is a checkpoint of official LLaVA's LoRA training (adapter_config.json and a DeepSpeed folder)"
    if any(key in (config_of_run(found) or {}) for key in _NEITHER):
        return f"it is a checkpoint of official LLaVA's LoRA training (adapter_config.json, and the run's {CONFIG})"
    if ADAPTER_CONFIG in found.names and (names := _whole_names(found)) and any(_PROJECTOR in name for name in names):
        return "its tensors have the names of official LLaVA under peft"
    return None


def _is_projector(found: Found) -> bool:
    """Whether a torch file holds the projector that LLaVA's pretraining saves, by whatever name, and nothing more."""
    if found.path.suffix != ".bin":
        return False
    table = layout_table(NAME)
    named = [table.read(name) for name in state_dict(found.headers.torch(found.path)).tensors]
    kinds = {one.canonical.partition(".")[0] if one is not None else None for one in named}
    return PROJECTOR in kinds and kinds <= {PROJECTOR, LLM}


def _whole_names(found: Found) -> Iterable[str]:
    """The names in the files of whole weights, none where there are no such files."""
    if not any(name.startswith(STEMS) and name.endswith((".bin", ".safetensors")) for name in found.names):
        return ()
    return open_weights(found.path, stems=STEMS, headers=found.headers).tensors


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open a folder of shards, a LoRA folder with non_lora_trainables.bin, or a projector alone.

    Raises what the readers raise; UnsupportedError for names that the layout does not have.
    """
    path, beside = found.path, found.beside
    config, notes = _config(beside)
    sets = _weights(found)
    tensors = {**trained_beside(found), **{name: tensor for one in sets for name, tensor in one.tensors.items()}}
    sorted_ = sort_tensors(tensors, layout_table(NAME), path)
    adapter, lora = read_adapter_config(beside), adapter_settings(beside)
    paths = {module: path.removeprefix(PREFIX) for module, path in sorted_.paths.items()}
    parts: dict[str, Part] = {}
    dropped = list(sorted_.dropped)
    for name in (LLM, VISION, PROJECTOR):
        parts[name], left = sorted_.part(name, lora, str(path), paths)
        dropped += left
    parts[LLM], told = _with_embedding(parts[LLM])
    text, own = _split(config, path)
    base = str(own.get("_name_or_path") or "") or (_lora_base(adapter) if adapter else None)
    has_llm = parts[LLM].state == "full"
    if has_llm and text is not None:
        _check_family(text, config or {}, parts[LLM], path)
    parts[LLM] = Part(
        parts[LLM].weights,
        parts[LLM].adapter,
        None if has_llm else base,
        text if has_llm else None,
        beside if has_llm else None,
    )
    parts[VISION] = Part(parts[VISION].weights, parts[VISION].adapter, own.get("mm_vision_tower"))
    if (bridge := parts[PROJECTOR].adapter) is not None:  # trained whole first, so that its weights are beside the LoRA
        parts[PROJECTOR] = Part(bridge.overrides, merge=(replace(bridge, overrides={}),))
    return Checkpoint(
        layout=NAME,
        extra=sorted_.extra,
        path=path,
        root=found.root,
        files=tuple(file for one in sets for file in one.files),
        beside=beside,
        parts=parts,
        settings=Settings.of(read_facts(NAME, own, str(beside.place(CONFIG)))),
        image_newline=sorted_.image_newline,
        dropped=tuple(dropped),
        notes=(*(note for one in sets for note in one.notes), *notes, *told),
        warnings=(*(w for one in sets for w in one.warnings), *_tower_warning(own, parts[VISION])),
        stubs=tuple(stub for one in sets for stub in one.stubs),
        as_written=all(one.plain for one in sets),
        settled=config is not None,
        unknown_keys={key: own[key] for key in unknown_keys(own, (NAME, "common"), stated_in(NAME))},
        every_feature=EVERY_PATCH,
        record=read_record(beside),
        whole=has_llm,
        base=None if has_llm else base,
    )


def _weights(found: Found) -> list[Weights]:
    path, names, headers = found.path, found.names, found.headers
    if found.file is not None or path.is_file():
        return [open_weights(found.weights, headers=headers)]
    if NON_LORA in names:
        return [
            open_weights(require_inside(path, NON_LORA), headers=headers),
            open_weights(path, stems=(STEM,), headers=headers),
        ]
    if PROJECTOR_FILE in names and not any(n.startswith(("model", "pytorch_model")) for n in names):
        return [open_weights(require_inside(path, PROJECTOR_FILE), headers=headers)]
    if is_adapter(names) and not any(n.startswith(STEMS) for n in names):
        return [open_weights(path, stems=(STEM,), headers=headers)]
    return [open_weights(path, stems=STEMS, headers=headers)]


def _config(beside: Sidecars) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The config of a folder, else that of the run that it is a checkpoint of, said; None where there is neither."""
    if beside.has(CONFIG):
        return old_flavour(read_config(beside, CONFIG)), ()
    run = folder_sidecars(beside.where.absolute().parent)
    if beside.has(ADAPTER_CONFIG) and run.has(CONFIG):
        config = read_config(run, CONFIG)
        if any(key in config for key in _NEITHER):
            return old_flavour(config), (f"config.json is that of the run ({run.where.name})",)
    return None, ()


def _with_embedding(part: Part) -> tuple[Part, tuple[str, ...]]:
    """A language model of which nothing is here but the embedding: it takes the place of the base's, said.

    Pretraining with `mm_use_im_start_end` saves it beside the projector (LLaVA's llava_trainer.py, `keys_to_match`). It
    has rows for tokens that a base's tokenizer may lack: those do not fit, and the error names it.
    """
    embeddings = {table.embedding for table in architectures().values() if table.embedding}
    if part.adapter is not None or not part.weights or not part.weights.keys() <= embeddings:
        return part, ()
    (name,) = part.weights
    rows = part.weights[name].shape[0]
    note = f"{name.partition('.')[2]}, {rows} rows, lies beside the projector and takes the place of the base's"
    return Part(adapter=Adapter(None, {}, part.weights, part.weights)), (note,)


def _lora_base(adapter: Mapping[str, Any]) -> str | None:
    base = adapter.get("base_model_name_or_path")
    return str(base) if base else None


def _split(config: Mapping[str, Any] | None, path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The text model's config, and LLaVA's own keys."""
    if config is None:
        return None, {}
    own = {key: value for key, value in config.items() if _is_own(key)}
    text = {key: value for key, value in config.items() if key not in own}
    text["model_type"] = _text_type(config, path)
    own["_name_or_path"] = config.get("_name_or_path")
    return text, own


def _is_own(key: str) -> bool:
    shared = key_table(LLM).knows(key) or key_table("common").knows(key)
    return not shared and (key.startswith(_OWN_KEYS) or key in stated_in(NAME) or key_table(NAME).knows(key))


def _text_type(config: Mapping[str, Any], path: Path) -> str:
    """The model type of the language model alone, by the class that the config names and by its model type.

    Raises UnsupportedError (exit 4) where the two name different families, or none that is known.
    """
    if "text_config" in config:
        raise UnsupportedError(
            f"{path}: the config is that of a transformers LLaVA, but the tensors have the names of official LLaVA",
            hint="give the config.json of official LLaVA, or "
            "put these tensors on a whole model of any layout by --base MODEL",
        )
    kind, classes = str(config.get("model_type")), config.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    known = [table for table in architectures().values() if table.official]
    # LLaVA-1.5's own word, which OneVision's configs have too.
    generic = {"llama"} if kind == "llava" else set()
    by_kind = {table.model_types[0] for table in known if kind in (table.official, *table.forks)} - generic
    by_class = {table.model_types[0] for table in known if class_of(table.official) == named}
    if by_kind and by_class and not by_kind & by_class:
        raise UnsupportedError(
            f"{path / CONFIG}: model_type is {printable(kind)}, but architectures names {printable(named)}: they "
            "belong to different families",
            hint="get the config that the model was trained with, or correct the wrong one of the two",
        )
    found = by_class or by_kind or (set() if named.startswith("Llava") else generic)
    if not found:
        what = f" ({printable(named)})" if named else ""
        raise UnsupportedError(
            f"official LLaVA with model_type {printable(kind)!r}{what} is not known",
            hint='name its family in a table, and give that by --table FILE.toml: `architecture = "llama"` and '
            f'`forks = ["{printable(kind)}"]`',
        )
    return min(found)


def _check_family(text: Mapping[str, Any], config: Mapping[str, Any], part: Part, path: Path) -> None:
    """Raise UnsupportedError (exit 4) where the tensors are those of another family than the config names."""
    fitting = kinds_that_fit(LLM, text, part.weights)
    if fitting and text["model_type"] not in fitting:
        named = listed(
            [f"{key} {printable(config[key])}" for key in ("model_type", "architectures") if config.get(key)]
        )
        raise UnsupportedError(
            f"{path}: its config says {text['model_type']} ({named}), but its tensors are those of {listed(fitting)}",
            hint="get the config and the weights of the same model",
        )


def class_of(kind: str) -> str:
    """The class of LLaVA's code for a model type of its own: llava_qwen is LlavaQwenForCausalLM."""
    return f"Llava{kind.removeprefix('llava_').capitalize()}ForCausalLM"


def _tower_warning(own: Mapping[str, Any], tower: Part) -> tuple[str, ...]:
    # LLaVA-NeXT names the parts that it trained instead; Bunny and ShareGPT4V have flags of their own.
    trained = any(own.get(flag) for flag in _TRAINED) or "mm_vision_tower" in str(own.get("mm_tunable_parts"))
    if tower.state != "full" or trained:
        return ()
    return (
        "the folder holds a vision tower although its config says unfreeze_mm_vision_tower: false: it is taken. "
        f"LLaVA's own loader would take {printable(str(own.get('mm_vision_tower')))} instead",
    )
