"""Write the official LLaVA layout, or its projector alone (`mm_projector.bin`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import TORCH_NAMES
from llava_convert.core.text import to_json
from llava_convert.layouts import single_part as single
from llava_convert.layouts.base import Needs
from llava_convert.layouts.defaults import output_dtype, shard_limit
from llava_convert.layouts.naming import outputs
from llava_convert.layouts.official.read import EVERY_PATCH, NAME, class_of
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION, Checkpoint
from llava_convert.model.configs import family, has_head, ordered, without_last_block
from llava_convert.model.facts import words_of
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Model
from llava_convert.model.tables.names import layout_table
from llava_convert.model.target import FileSet, Target


def needs(checkpoint: Checkpoint, part: str) -> Needs:
    if part == PROJECTOR:
        return Needs((PROJECTOR,), (), (LLM, VISION))
    if part != ALL:
        return single.needs(part)
    if carries_tower(checkpoint):
        return Needs((LLM, VISION, PROJECTOR), (LLM, VISION))
    return Needs((LLM, PROJECTOR), (LLM,), (VISION,))


def carries_tower(checkpoint: Checkpoint) -> bool:
    """Whether the tower was trained, or comes whole from a layout that always carries it."""
    return checkpoint.parts[VISION].state != "absent"


def lower(model: Model, options: TargetOptions) -> Target:
    """The files of the official layout. Raises UnsupportedError for a family that LLaVA's code has no class for."""
    if options.part == PROJECTOR:
        return _projector_alone(model, options)
    if options.part != ALL:
        return single.lower(model, options, NAME)
    model = _cut(model)
    made = Artefacts(model, options)
    dtype = output_dtype(model, options)
    tensors = outputs(model.recipes, layout_table(NAME), dtype)
    files: dict[str, bytes] = {"config.json": to_json(_config(model, made, dtype))}
    files |= made.generation_file()
    files |= made.tokenizer_files()
    preprocessor = made.preprocessor_config(for_hf=False)
    if preprocessor is not None:
        files["preprocessor_config.json"] = to_json(preprocessor)
    return Target(
        NAME,
        (FileSet(tensors, limit=shard_limit(model, options, NAME)),),
        files,
        notes=made.notes(LLM, VISION),
        warnings=made.warnings(LLM, VISION),
    )


def _config(model: Model, made: Artefacts, dtype: str) -> dict[str, Any]:
    text = model.configs[LLM]
    table = family(LLM, text)
    kind = table.official
    if not kind:
        raise UnsupportedError(
            f"official LLaVA has no class for {text['model_type']}",
            hint="--as llama writes it as one that computes the same"
            if "llama" in table.sections.get("as", {})
            else None,
        )
    projector = projector_config({name: recipe.tensor for name, recipe in model.part(PROJECTOR).items()})
    config = made.text_config(TORCH_NAMES[dtype])
    config |= {
        "architectures": [class_of(kind)],
        "model_type": kind,
        "mm_hidden_size": projector["vision_hidden_size"],
        # "linear" would be a bare layer, without the index in its tensors' names.
        "mm_projector_type": f"mlp{projector['depth']}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_vision_tower": made.id_of(VISION)[0],
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": bool(model.part(VISION)),
        "use_mm_proj": True,
        "use_cache": True,
        **words_of(NAME, model.facts),
    }
    if _is_cut(model):  # what its trainers write, and its readers do not look at
        config |= {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2}
    return ordered(config)


def _is_cut(model: Model) -> bool:
    """Whether the tower is one of which LLaVA-NeXT's code cuts the last block and the head off."""
    return VISION in model.configs and model.configs[VISION].get("model_type") in EVERY_PATCH


def _cut(model: Model) -> Model:
    """The model with its tower as LLaVA-NeXT's code leaves it: cut behind the layer that is read.

    Raises UnsupportedError (exit 4) for features that this code does not take of such a tower.
    """
    if not _is_cut(model):
        return model
    _refuse_other_features(model)
    tower = model.configs[VISION]
    if model.checkpoint.settings.select_layer == -1:
        return model
    shorter = without_last_block(tower)
    kept = family(VISION, shorter).tensors(shorter)
    recipes = {n: r for n, r in model.recipes.items() if not n.startswith(f"{VISION}.") or n in kept}
    settings = replace(model.checkpoint.settings, select_layer=-1)
    return replace(
        model,
        recipes=recipes,
        configs={**model.configs, VISION: shorter},
        checkpoint=replace(model.checkpoint, settings=settings),
    )


def _refuse_other_features(model: Model) -> None:
    """Raise UnsupportedError (exit 4) for features that no code takes of such a tower in an official folder."""
    kind = model.configs[VISION].get("model_type")
    settings = model.checkpoint.settings
    layer = -1 if not has_head(model.configs[VISION]) else -2
    if (settings.select_layer, settings.select_strategy) == (layer, "full"):
        return
    raise UnsupportedError(
        f"the model was trained on layer {settings.select_layer} of its {kind} tower ({settings.select_strategy!r} "
        "features), but LLaVA-NeXT's code, which reads official folders with such a tower, always uses all features "
        f"of layer {layer}",
        hint="convert to hf or xtuner, which can hold this setting",
    )


def _projector_alone(model: Model, options: TargetOptions) -> Target:
    model = _cut(model)
    made = Artefacts(model, options)
    dtype = output_dtype(model, options)
    tensors = outputs(model.part(PROJECTOR), layout_table(NAME), dtype)
    files: dict[str, bytes] = {}
    if LLM in model.configs:
        files["config.json"] = to_json(_config(model, made, dtype))
    notes = made.notes(LLM, VISION) if LLM in model.configs else ()
    return Target(NAME, (FileSet(tensors, stem="mm_projector", container="torch"),), files, notes=notes)
