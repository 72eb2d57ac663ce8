"""Write xtuner's layout: one file set a part; what was frozen is left out."""

from __future__ import annotations

from pathlib import Path

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import InputError
from llava_convert.core.text import to_json
from llava_convert.layouts import single_part as single
from llava_convert.layouts.adapter_folder import adapter_config
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import output_dtype
from llava_convert.layouts.naming import adapter_outputs, outputs
from llava_convert.layouts.xtuner.read import (
    LLM_ADAPTER,
    NAME,
    PROJECTOR_CONFIG,
    PROJECTOR_FOLDER,
    VISION_ADAPTER,
    VISION_FOLDER,
)
from llava_convert.model.checkpoint import (
    LLM,
    PART_WORDS,
    PARTS,
    PROJECTOR,
    VISION,
    Checkpoint,
)
from llava_convert.model.configs import ordered
from llava_convert.model.facts import words_of
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Model
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target

_CODE = Path(__file__).parent / "projector_code"


_FIXED = "F32"


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
            files[f"{folder}/adapter_config.json"] = to_json(adapter_config(made, part, adapter))
            named.append(part)
        elif not model.part(part):
            continue
        elif part == LLM:
            sets.append(single.llm_files(model, options, dtype, NAME))
            files |= single.llm_artefacts(model, made, dtype, words_of(NAME, model.facts))
            named.append(part)
        elif part == VISION:
            sets.append(single.vision_files(model, options, _FIXED, NAME, VISION_FOLDER))
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
    return Target(NAME, tuple(sets), files, notes=made.notes(*named), warnings=made.warnings(*named))


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
        "llm_hidden_size": sizes["text_hidden_size"],
        "model_type": "projector",
        "torch_dtype": "float32",
        "visual_hidden_size": sizes["vision_hidden_size"],
        **words_of(NAME, model.facts, file=PROJECTOR_CONFIG),
    }
    files = {PROJECTOR_CONFIG: to_json(ordered(config))}
    for name in ("configuration_projector.py", "modeling_projector.py"):
        files[f"{PROJECTOR_FOLDER}/{name}"] = (_CODE / name).read_bytes()
    return files
