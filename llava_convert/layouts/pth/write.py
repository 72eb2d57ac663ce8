"""Write an mmengine `.pth`, as xtuner's training leaves one: its state dict, and the config as text.

It holds what was trained, or is whole; frozen parts are absent. xtuner takes it as `pretrained_pth` and converts it. A
tensor keeps its dtype unless another is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.arrays import FLOATS
from llava_convert.core.errors import InputError
from llava_convert.core.tensors import FROM_TORCH_NAMES, TORCH_NAMES
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import refuse_quantised
from llava_convert.layouts.naming import llm_dtype, outputs
from llava_convert.layouts.pth.config_text import config_text
from llava_convert.layouts.pth.read import NAME
from llava_convert.model.adapter import Adapter
from llava_convert.model.checkpoint import LLM, PART_WORDS, PARTS, PROJECTOR, Checkpoint
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.recipe import Model, Recipe
from llava_convert.model.tables.names import CANONICAL, layout_table
from llava_convert.model.target import FileSet, Output, Target

STEM = "model"
# What mmengine's runner writes beside its checkpoints: it makes the folder one that is followed to the file.
_POINTER = "last_checkpoint"


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    wanted = PARTS if part == ALL else (part,)
    whole = tuple(p for p in wanted if checkpoint.parts[p].state == "full")
    lora = tuple(p for p in wanted if checkpoint.parts[p].state == "lora")
    return Needs(whole, tuple(p for p in whole if p != PROJECTOR), lora)


def lower(model: Model, options: TargetOptions) -> Target:
    """One file. Raises InputError where the source holds none of the asked parts."""
    made, asked = Artefacts(model, options), options.dtype
    refuse_quantised(model.recipes)
    wanted = PARTS if options.part == ALL else (options.part,)
    held = {part: model.checkpoint.parts[part].state if part in wanted else "absent" for part in PARTS}
    tensors: list[Output] = []
    for part in wanted:
        adapter = model.checkpoint.parts[part].adapter
        if held[part] == "lora" and adapter is not None:
            tensors += _adapter(adapter)
        elif held[part] == "full":
            tensors += outputs(model.part(part), layout_table(NAME), "")
    if not tensors:
        words = PART_WORDS[options.part] if options.part != ALL else "parts"
        raise InputError(
            f"the checkpoint holds no trained {words}: a .pth leaves frozen parts out",
            hint="convert to official or hf, which carry the base model's weights",
        )
    dtype = None if asked is None else FROM_TORCH_NAMES[asked]
    tensors = [Output(o.name, o.canonical, o.recipe, dtype or _kept(o.recipe, model), o.members) for o in tensors]
    loaded = asked or (TORCH_NAMES.get(llm_dtype(model)) if held[LLM] == "full" else None)
    meta = {"cfg": config_text(made, held, loaded), "epoch": 0, "iter": 0}
    files = FileSet(tuple(tensors), stem=STEM, container="torch", around={"meta": meta}, key="state_dict")
    notes = made.notes(*(part for part in PARTS if part != PROJECTOR and held[part] != "absent"))
    return Target(NAME, (files,), {_POINTER: f"{STEM}.pth".encode()}, notes=notes)


def _kept(recipe: Recipe, model: Model) -> str:
    """The dtype that a tensor had on disk, also where a merge, made in float64, is on the way; of FP8 the model's."""
    if recipe.dtype != "F64":
        return recipe.dtype
    stored = recipe.tensor.dtype
    return stored if stored in FLOATS else llm_dtype(model)


def _adapter(adapter: Adapter) -> Iterable[Output]:
    """An adapter's tensors as a state dict of the model under training names them."""
    table, peft = layout_table(NAME), layout_table("peft")
    saved = adapter.settings.modules_to_save if adapter.settings is not None else None
    for name, tensor in adapter.tensors.items():
        module, _, param = name.rpartition(".")
        live = next((disk for disk, row in peft.named(name, CANONICAL) if row.dialect == "live"), name)
        if live == name and saved and module.endswith(tuple(saved)):
            live = f"{module}.modules_to_save.default.{param}"
        disk = next(disk for disk, row in table.named(live, CANONICAL) if row.dialect == "adapter")
        yield Output(disk, name, Recipe(tensor), tensor.dtype)
