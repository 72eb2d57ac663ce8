"""Write the adapters of any trainer as one that today's peft puts onto a transformers LLaVA, and vLLM too.

Modules are named as transformers has them in memory (`model.language_model.layers…`, a tower without `vision_model.`):
with other names peft applies nothing. A projector that was trained is one of `modules_to_save`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.hub_names import is_id
from llava_convert.core.tensors import FROM_TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.layouts.adapter_folder import ADAPTER_CONFIG, PREFIX, STEM, peft_config
from llava_convert.layouts.base import Needs
from llava_convert.layouts.peft.read import NAME
from llava_convert.model.adapter import Adapter, split_tail
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, PARTS, PROJECTOR, VISION, Checkpoint
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Output, Target

# What transformers 5.6 and later call the modules of a LLaVA in memory, and what 4.52 and later do where that is not
# another name (mappings/layouts/hf.toml).
_IN_MEMORY = ("newflat", "new")
_PROJECTOR = "multi_modal_projector"


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    """The projector, which an adapter holds whole. Raises what `lower` raises of a source without adapters."""
    _adapters(checkpoint, part)
    whole = part in (ALL, PROJECTOR) and checkpoint.parts[PROJECTOR].state == "full"
    return Needs((PROJECTOR,) if whole else ())


def lower(model: Model, options: TargetOptions) -> Target:
    """One adapter of all parts. Raises UnsupportedError for what it cannot hold, and where there is none."""
    adapters = _adapters(model.checkpoint, options.part)
    outputs = [output for part, adapter in adapters.items() for output in _outputs(adapter, options)]
    outputs += [_output(name, recipe, options) for name, recipe in model.part(PROJECTOR).items()]
    config = _config(model, adapters, options)
    base = config["base_model_name_or_path"]
    note = (
        "base_model_name_or_path is empty: the adapter goes onto a LLaVA of transformers with the same language model "
        "and tower, which `llava-convert convert BASE --to hf` makes; --base ID writes its name"
    )
    return Target(
        NAME,
        (FileSet(tuple(outputs), stem=STEM, limit=None),),
        {ADAPTER_CONFIG: to_json(config)},
        notes=() if base else (note,),
    )


def _adapters(checkpoint: Checkpoint, asked: str) -> dict[str, Adapter]:
    """The adapters of all parts, or of the one asked for. Raises UnsupportedError (exit 4) where there is none."""
    parts = PARTS if asked == ALL else (asked,)
    held = any(adapter.modules for part in parts for adapter in checkpoint.parts[part].adapters)
    found = {part: one for part in parts if (one := _adapter(checkpoint, part)) is not None} if held else {}
    if not any(adapter.modules for adapter in found.values()):
        words = PART_WORDS[asked] if asked != ALL else "model"
        raise UnsupportedError(
            f"{checkpoint.path} holds no adapter of the {words}, and a PEFT folder can hold nothing else",
            hint="give a checkpoint that was trained by LoRA; hf, official and xtuner hold whole parts",
        )
    return found


def _adapter(checkpoint: Checkpoint, part: str) -> Adapter | None:
    """The one adapter of a part. Raises UnsupportedError (exit 4) for several, and for a part trained whole."""
    own = checkpoint.parts[part]
    if part == PROJECTOR and own.state == "full":
        return None
    merged = "convert to hf, which merges them" if len(own.adapters) > 1 else "convert to hf, which holds all of it"
    alone = [PART_WORDS[name] for name, other in checkpoint.parts.items() if name != part and other.state == "lora"]
    merged += f", or write one adapter alone by --part {alone[0]}" if alone else ""
    if len(own.adapters) > 1 or own.state == "full":
        what = f"has {len(own.adapters)} adapters" if len(own.adapters) > 1 else "was trained whole"
        raise UnsupportedError(f"the {PART_NAMES[part]} {what}, and one PEFT adapter cannot hold that", hint=merged)
    if own.adapter is not None and not checkpoint.bare:
        _refuse_rows(own.adapter)
    return own.adapter


def _refuse_rows(adapter: Adapter) -> None:
    """Raise UnsupportedError (exit 4) for what was trained of a vocabulary: a transformers LLaVA has other rows."""
    ends = {role for table in architectures().values() for role in (table.embedding, table.head) if role}
    touched = {split_tail(name)[0] for name in adapter.tensors} & ends
    if touched:
        raise UnsupportedError(
            f"the adapter trains {', '.join(sorted(touched))}, but lacks the rows for <image> and <pad> that a "
            "transformers LLaVA has there",
            hint="convert to hf, which merges it",
        )


def _outputs(adapter: Adapter, options: TargetOptions) -> list[Output]:
    return [_output(name, Recipe(tensor), options) for name, tensor in adapter.tensors.items()]


def _output(canonical: str, recipe: Recipe, options: TargetOptions) -> Output:
    dtype = FROM_TORCH_NAMES[options.dtype] if options.dtype else recipe.dtype
    bare, tail = split_tail(canonical)
    name = in_memory(bare)
    return Output(PREFIX + (name.rpartition(".")[0] + tail if tail else name), canonical, recipe, dtype)


def in_memory(canonical: str) -> str:
    """What today's transformers calls a tensor of a LLaVA in memory. Raises UnsupportedError where it has none."""
    named = layout_table("hf").write(canonical, _IN_MEMORY)
    if named is None:
        raise UnsupportedError(f"transformers' LLaVA has no module for {canonical}")
    return named[0]


def _module(canonical: str) -> str:
    return in_memory(f"{canonical}.weight").removesuffix(".weight")


def _config(model: Model, adapters: dict[str, Adapter], options: TargetOptions) -> dict[str, Any]:
    """adapter_config.json: rank and alpha of most modules, patterns for the others."""
    held = {part: adapter for part, adapter in adapters.items() if adapter.modules}
    settings = {part: adapter.settings for part, adapter in held.items()}
    rules = {(one.use_rslora if one is not None else False) for one in settings.values()}
    doras = {module.magnitude is not None for adapter in held.values() for module in adapter.modules.values()}
    if len(rules) > 1 or len(doras) > 1:
        raise UnsupportedError(
            "one part uses rsLoRA or DoRA and another does not: one PEFT adapter cannot hold both",
            hint=f"--part {PART_WORDS[LLM]} and --part {PART_WORDS[VISION]} make an adapter of each",
        )
    rslora = rules.pop()
    counted: dict[str, tuple[int, float]] = {}
    for part, adapter in held.items():
        alpha = options.lora_alpha.get(PART_WORDS[part])
        for module, lora in adapter.modules.items():
            scale = adapter.scale(module, alpha=alpha)
            counted[_module(module)] = (lora.rank, _number(scale * (lora.rank**0.5 if rslora else lora.rank)))
    rank, alpha = Counter(counted.values()).most_common(1)[0][0]
    # Without the first name: peft 0.12 wants something before what a pattern matches.
    others = {
        re.escape(path.partition(".")[2] or path): pair for path, pair in counted.items() if pair != (rank, alpha)
    }
    biases = {one.bias for one in settings.values() if one is not None} - {"none"}
    tokens = {
        _module(name.removesuffix(".weight")): list(rows.rows)
        for adapter in adapters.values()
        for name, rows in adapter.tokens.items()
    }
    return peft_config(
        alpha_pattern={path: pair[1] for path, pair in others.items()},
        auto_mapping={
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        base_model_name_or_path=_base(model, options),
        bias=min(biases, default="none"),
        lora_alpha=alpha,
        modules_to_save=_saved(model, adapters) or None,
        r=rank,
        rank_pattern={path: pair[0] for path, pair in others.items()},
        target_modules=sorted(counted),
        use_dora=doras.pop(),
        use_rslora=rslora,
        **({"trainable_token_indices": tokens} if tokens else {}),
    )


def _number(value: float) -> float:
    nearest = round(value, 9)  # a scale that was divided by the rank, or by its root
    return int(nearest) if float(nearest).is_integer() else nearest


def _base(model: Model, options: TargetOptions) -> str:
    """The name of the LLaVA to load first: as asked for, else the one that an adapter of peft names, no path."""
    asked = options.ids.get(ALL)
    named = model.checkpoint.base if model.checkpoint.bare else None
    return asked or (named if named is not None and is_id(named) else "")


def _saved(model: Model, adapters: dict[str, Adapter]) -> list[str]:
    """The modules that were trained whole: every one whose weight is there, and the projector as one."""
    whole = {_PROJECTOR} if model.part(PROJECTOR) else set()
    for part, adapter in adapters.items():
        kept = {name for name in adapter.overrides if name in adapter.tensors and name.endswith(".weight")}
        whole |= {_PROJECTOR if part == PROJECTOR else _module(name.removesuffix(".weight")) for name in kept}
    return sorted(whole)
