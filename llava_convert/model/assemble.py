"""From a checkpoint to the whole model that it stands for.

A checkpoint is usually partial. Each tensor comes from the checkpoint, else from the base model; LoRA is merged on
top. Nothing is read here but headers, except that tied weights which are stored twice are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llava_convert.core.errors import InputError
from llava_convert.model.adapter import Adapter, disputed
from llava_convert.model.bases import FOLDER_HINT, Base, find_base
from llava_convert.model.checkpoint import (
    IMAGE_NEWLINE,
    LLM,
    PART_NAMES,
    PART_WORDS,
    PROJECTOR,
    VISION,
    Checkpoint,
    Dropped,
    Part,
)
from llava_convert.model.checks import (
    check_base,
    check_heads,
    check_joints,
    check_layer,
    check_projector,
    check_shapes,
    refuse_unknown,
    refuse_unknown_base,
)
from llava_convert.model.configs import family, named_config
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Bases, Model, Recipe, joined_recipe
from llava_convert.model.tables.families import Architecture, Expected, architecture_for
from llava_convert.model.tables.names import grouped
from llava_convert.model.towers import tower_config
from llava_convert.model.vocabulary import settle_rows
from llava_convert.ops.rows import SetRows, TakeRows
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.remote.session import Session
from llava_convert.storage.streams import same_bytes


def assemble(
    checkpoint: Checkpoint,
    asked: Bases,
    session: Session,
    *,
    weights: Iterable[str],
    configs: Iterable[str],
    optional_configs: Iterable[str] = (),
    vocab: str | None = None,
) -> Model:
    """The model that a target needs: the `weights` of some parts, the `configs` of some.

    `session` reaches the bases. Parts in `optional_configs` get their config when their base can be had.
    `vocab` says what counts where rows and vocabulary differ. Raises
    InputError (exit 3) for what is missing or does not fit, UnsupportedError (exit 4) for unknown tensors.
    """
    wanted = tuple(weights)
    bases: dict[str, Base] = {}
    found_configs: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    absent: list[InputError] = []
    for part in (LLM, VISION):
        if part in wanted or part in tuple(configs):
            try:
                _add_part(checkpoint, part, asked, session, bases, found_configs)
            except InputError as problem:
                refuse_unknown_base(part, asked.asked(part) or checkpoint.parts[part].base or "")
                if not (problem.hint or "").startswith(FOLDER_HINT):
                    raise
                absent.append(problem)  # the other base may be missing too, and is to be said at once
        elif part in tuple(optional_configs):
            try:
                _add_part(checkpoint, part, asked, session, bases, found_configs)
            except InputError as problem:
                warnings.append(f"{problem.message}: going on without its files")
    if absent:
        raise _together(absent)
    if PROJECTOR in wanted and checkpoint.parts[PROJECTOR].state == "absent":
        raise InputError(
            f"{checkpoint.path}: there is no projector (the layers between vision tower and language model)",
            hint="give a file or a model that has it by --projector, or the LLaVA that it was trained from by --base",
        )
    if VISION in found_configs:
        checkpoint, found_configs[VISION] = checkpoint.with_tower(found_configs[VISION])
        check_layer(checkpoint, found_configs[VISION])
    recipes: dict[str, Recipe] = {}
    dropped: list[Dropped] = []
    tied = False
    vocabulary = ""
    merged = 0
    for part in (LLM, VISION, PROJECTOR):
        if part not in wanted:
            continue
        expected = _expected(checkpoint, part, found_configs)
        if part in found_configs:
            check_heads(part, found_configs[part])
        refuse_unknown(checkpoint, part, expected)
        stored = _trained(checkpoint.parts[part])
        if any(name not in stored and want.tied not in stored for name, want in expected.items()):
            # Only now: a fully trained part needs its base's config alone, not gigabytes of its weights.
            base = _base(checkpoint, part, asked, session, weights=True)
            if base is not None:
                bases[part] = base
                stored = {n: replace(r, origin="base") for n, r in _trained(base.weights_part).items()} | stored
        if part == LLM:
            stored = _with_frozen_head(checkpoint.parts[part], found_configs[part], expected, bases.get(part)) | stored
        synthetic = checkpoint.parts[part].synthetic
        stored = {name: Recipe(*made, "synthetic") for name, made in synthetic.items()} | stored
        part_recipes, part_tied = _recipes(part, expected, stored, bases.get(part))
        if any(recipe.origin == "base" for recipe in part_recipes.values()):
            check_base(checkpoint, part, bases[part], expected, found_configs[part], warnings)
            dropped += bases[part].dropped
        if part == LLM and (vocabulary := settle_rows(part_recipes, found_configs[LLM], vocab)):
            expected = _expected(checkpoint, part, found_configs)
        check_shapes(part, expected, part_recipes)
        if part in bases and any(recipe.origin == "base" for recipe in part_recipes.values()):
            merged += _merge(bases[part].weights_part.adapters, part, part_recipes, None)
        merged += _merge(checkpoint.parts[part].adapters, part, part_recipes, asked.lora_alpha.get(PART_WORDS[part]))
        if part == LLM and part_tied:
            tied = _tie(part_recipes, found_configs[LLM], warnings)
        recipes.update(part_recipes)
    if PROJECTOR in wanted:
        check_projector(checkpoint)
        check_joints(recipes, found_configs)
    if checkpoint.image_newline is not None and set(wanted) >= {LLM, PROJECTOR}:
        recipes[IMAGE_NEWLINE] = Recipe(checkpoint.image_newline)
    notes = [f"merged LoRA into {merged} modules"] if merged else []
    made_up = [name for name, recipe in recipes.items() if recipe.origin == "synthetic"]
    if made_up:
        notes.append(
            f"{grouped(made_up)}: made up (identity), since neither the source nor a base has it and LLaVA never reads "
            f"it; --{PART_WORDS[VISION]} gives the published one"
        )
    for adapter in (adapter for part in wanted for adapter in checkpoint.parts[part].adapters):
        if unsure := disputed(adapter):
            warnings.append(
                f"rank_pattern and alpha_pattern match {grouped(unsure)} by different keys: peft 0.12, which xtuner "
                "trains with, then keeps the common alpha, and so does this conversion; later versions of peft do not"
            )
    notes += [vocabulary] if vocabulary else []
    told = tuple(notes), tuple(warnings), tuple(dropped)
    return Model(checkpoint, recipes, found_configs, bases, tied, *told, vocabulary=vocabulary)


def _together(absent: list[InputError]) -> InputError:
    """One error for all bases that were not found."""
    if len(absent) == 1:
        return absent[0]
    options = " ".join((problem.hint or "").removeprefix(FOLDER_HINT) for problem in absent)
    return InputError(
        "; ".join(problem.message for problem in absent), hint=f"name their folders, or hub ids: {options}"
    )


def without_added(model: Model) -> Model:
    """The model less the rows and tokens which an earlier conversion recorded as added to it."""
    added = (model.checkpoint.record or {}).get("added")
    if not isinstance(added, dict) or LLM not in model.configs or model.embedding not in model.recipes:
        return model
    rows = added["rows"]
    recipes, configs = dict(model.recipes), dict(model.configs)
    if recipes[model.embedding].shape[0] != rows["to"]:
        raise InputError(
            f"{model.checkpoint.root}: conversion.json records an embedding of {rows['to']} rows, "
            f"it has {recipes[model.embedding].shape[0]}",
            hint="delete conversion.json, which is of another model: the weights do not need it",
        )
    if rows["from"] < rows["to"]:
        for name in (model.embedding, model.head):
            recipes[name] = recipes[name].then(TakeRows(rows["from"]))
        configs[LLM] = {**configs[LLM], "vocab_size": rows["from"]}
    return replace(model, recipes=recipes, configs=configs, added=added)


def _add_part(
    checkpoint: Checkpoint,
    part: str,
    asked: Bases,
    session: Session,
    bases: dict[str, Base],
    configs: dict[str, dict[str, Any]],
) -> None:
    """Find the config of a part, in the checkpoint or in its base model."""
    own = checkpoint.parts[part]
    if own.config is not None:
        configs[part] = named_config(own.config, part, where=str(checkpoint.path))
        given = _base(checkpoint, part, asked, session, weights=False) if asked.asked(part) is not None else None
        if given is not None:
            bases[part] = given  # for the files that the source lacks, a tokenizer say
        return
    if part == VISION and own.state == "full" and asked.asked(part) is None:
        # The official layout holds the tower's weights without its config.
        known = tower_config(own.weights, (checkpoint.record or {}).get("vision_config"))
        if known is not None:
            configs[part] = named_config({"_name_or_path": own.base, **known}, part, where=str(checkpoint.path))
            return
    base = _base(checkpoint, part, asked, session, weights=False)
    if base is None:
        raise InputError(
            f"the checkpoint holds no config of the {PART_NAMES[part]} and does not name its base model",
            hint=f"give its folder or hub id by --{PART_WORDS[part]}",
        )
    bases[part] = base
    configs[part] = dict(base.config)
    if part == LLM and checkpoint.settings.max_position_embeddings is not None:
        _lengthen(configs[part], checkpoint.settings.max_position_embeddings)


def _lengthen(config: dict[str, Any], positions: int) -> None:
    """Training on longer texts than the base's: xtuner scales rope linearly by a whole factor, and so must the output.

    Fact from xtuner 0.1.23's LLaVAModel._prepare_for_long_context_training.
    """
    before = config.get("max_position_embeddings")
    factor = (config.get("rope_scaling") or {}).get("factor", 1)
    if isinstance(before, int) and isinstance(factor, int | float) and positions > before * factor:
        config["rope_scaling"] = {"type": "linear", "factor": float(math.ceil(positions / (before * factor)))}


def _base(checkpoint: Checkpoint, part: str, asked: Bases, session: Session, *, weights: bool) -> Base | None:
    """The part's base model: the one that the user names, else the one that the source names."""
    if part in asked.given:
        return asked.given[part]
    explicit = asked.asked(part)
    name = explicit or checkpoint.parts[part].base
    if name is None:
        return None
    return find_base(
        part, name, checkpoint.path, session, explicit=explicit is not None, weights=weights, cache=asked.cache
    )


def _expected(checkpoint: Checkpoint, part: str, configs: Mapping[str, dict[str, Any]]) -> dict[str, Expected]:
    if part != PROJECTOR:
        return family(part, configs[part]).tensors(configs[part])
    return architecture_for(PROJECTOR, "projector").tensors(projector_config(checkpoint.parts[PROJECTOR].weights))


def _trained(own: Part) -> dict[str, Recipe]:
    """The whole tensors of a part that training left."""
    whole = dict(own.weights)
    for adapter in own.adapters:
        whole |= adapter.overrides
    found = {name: Recipe(tensor, own.ops.get(name, ()), own.origin) for name, tensor in whole.items()}
    for name, parts in own.joins.items():
        found[name] = joined_recipe([found.pop(one) for one in parts.names], parts.groups)
    return found


def _with_frozen_head(
    own: Part, config: dict[str, Any], expected: Mapping[str, Expected], base: Base | None
) -> dict[str, Recipe]:
    """The head of a tied language model whose embedding alone was trained under peft: it stays what both were.

    peft puts a LoRA, or a copy (`modules_to_save`), in the embedding's place and lets the head use the frozen weight;
    only `ensure_weight_tying` and single tokens go to both (0.21, measured). What was trained without peft is shared.
    """
    roles = family(LLM, config)
    if expected[roles.head].tied is None or not any(_adapts_alone(one, roles) for one in own.adapters):
        return {}
    below = _trained(base.weights_part) if base is not None else {}
    below |= _trained(replace(own, adapter=None, merge=()))
    found = below.get(roles.head) or below.get(roles.embedding)
    return {} if found is None else {roles.head: found}


def _adapts_alone(adapter: Adapter, roles: Architecture) -> bool:
    """Whether an adapter changes the embedding and not the head."""
    module, head = (name.removesuffix(".weight") for name in (roles.embedding, roles.head))
    saved = adapter.settings.modules_to_save if adapter.settings is not None else None
    copied = roles.embedding in adapter.overrides and any(module.endswith(name) for name in saved or ())
    return (module in adapter.modules or copied) and not {head, roles.head} & {*adapter.modules, *adapter.overrides}


def _recipes(
    part: str, expected: Mapping[str, Expected], stored: Mapping[str, Recipe], base: Base | None
) -> tuple[dict[str, Recipe], bool]:
    """One recipe for each expected tensor, and whether the head is tied to the embedding."""
    recipes: dict[str, Recipe] = {}
    missing: list[str] = []
    tied = False
    for name, want in expected.items():
        found = stored.get(name)
        if found is None and want.tied is not None:
            found = stored.get(want.tied)
        tied = tied or want.tied is not None
        if found is None:
            missing.append(name)
        else:
            recipes[name] = found
    if missing:
        where = f"neither the checkpoint nor the base {base.folder.name} has" if base else "the checkpoint lacks"
        raise InputError(
            f"{where} {len(missing)} tensor{'s' if len(missing) > 1 else ''} of the {PART_NAMES[part]}: "
            f"{grouped(missing)}",
            hint=None if part == PROJECTOR else f"give a base model that has them by --{PART_WORDS[part]}",
        )
    return recipes, tied


def _merge(adapters: Iterable[Adapter], part: str, recipes: dict[str, Recipe], alpha: float | None) -> int:
    """Put the LoRAs of a part on its recipes; every module must find its weight. Returns how many did."""
    return sum(_merge_one(part, recipes, adapter, alpha) for adapter in adapters)


def _merge_one(part: str, recipes: dict[str, Recipe], adapter: Adapter, alpha: float | None) -> int:
    unmatched = [module for module in adapter.modules if f"{module}.weight" not in recipes]
    if unmatched:
        raise InputError(
            f"the LoRA of the {PART_NAMES[part]} adapts {len(adapter.modules)} modules, but the model does not have "
            f"{len(unmatched)} of them: {grouped(unmatched)}",
            hint="give the model that it was trained on by --base",
        )
    for name, rows in adapter.tokens.items():
        if (
            name not in recipes
            or max(rows.rows) >= recipes[name].shape[0]
            or (recipes[name].shape[1:] != rows.values.shape[1:])
        ):
            raise InputError(
                f"the adapter has new values {list(rows.values.shape)} for rows up to {max(rows.rows)} of {name}, "
                f"but that is {list(recipes[name].shape) if name in recipes else 'missing'}",
                hint="give the model that it was trained on by --base",
            )
        recipes[name] = recipes[name].then(rows)
    for module, lora in adapter.modules.items():
        recipe = recipes[f"{module}.weight"]
        shape = recipe.shape
        columns = 1
        for size in shape[1:]:
            columns *= size
        fits = (columns, lora.rank * shape[0]) if lora.embedding else (shape[0], lora.rank * columns)
        if (lora.b.shape[0], lora.a.numel) != fits:
            raise InputError(
                f"the LoRA of {module} does not fit: A {list(lora.a.shape)}, B {list(lora.b.shape)}, "
                f"weight {list(shape)}; was it trained on another base model?"
            )
        op = adapter.merge_op(f"{module}.weight", alpha)
        if op is not None:
            recipes[f"{module}.weight"] = recipe.then(op)
    return len(adapter.modules)


def _tie(recipes: dict[str, Recipe], config: dict[str, Any], warnings: list[str]) -> bool:
    """Whether the head really equals the embedding; a different one is kept and the config told so."""
    roles = family(LLM, config)
    head, embedding = recipes[roles.head], recipes[roles.embedding]
    both = tuple(op for op in embedding.ops if not isinstance(op, SetRows))  # which peft gives to the head, too
    if head == embedding or (head.tensor.extents == embedding.tensor.extents and head.ops == both):
        recipes[roles.head] = embedding
        return True
    if head.tensor.dtype == embedding.tensor.dtype and not head.ops and not embedding.ops:
        with FilePool() as pool:
            if same_bytes(pool, head.tensor, embedding.tensor):
                recipes[roles.head] = embedding
                return True
    one, other = (name.split(".")[-2] for name in (roles.head, roles.embedding))
    warnings.append(f"{one} differs from {other} although the config ties them: both are kept, untied")
    config["tie_word_embeddings"] = False
    return False
