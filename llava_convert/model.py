"""The whole model that a checkpoint stands for: every tensor with where it comes from and what is merged into it.

A checkpoint is usually partial. Each tensor comes from the checkpoint, else from the base model; LoRA is merged on
top. Nothing is read here but headers, except that tied weights which are stored twice are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_convert.architecture import Expected, architecture_for
from llava_convert.bases import Base, find_base, is_folder
from llava_convert.checkpoint import IMAGE_NEWLINE, LLM, PART_NAMES, PART_WORDS, PROJECTOR, VISION, Checkpoint, Dropped
from llava_convert.configs import family, named_config
from llava_convert.errors import InputError, UnsupportedError
from llava_convert.hub import is_id, published_id
from llava_convert.lora import disputed
from llava_convert.mapping import grouped, printable
from llava_convert.ops import Op, TakeRows
from llava_convert.spec import StoredTensor
from llava_convert.storage.identity import identity
from llava_convert.storage.jsonfile import read_json
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import same_bytes
from llava_convert.towers import tower_config

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@dataclass(frozen=True)
class Bases:
    """What the user says of the base models; overrides what the source names."""

    llm: str | None = None
    visual_encoder: str | None = None
    llm_id: str | None = None
    visual_encoder_id: str | None = None
    lora_alpha: Mapping[str, float] = field(default_factory=dict)

    def asked(self, part: str) -> str | None:
        return {LLM: self.llm, VISION: self.visual_encoder}.get(part)

    def asked_id(self, part: str) -> str | None:
        return {LLM: self.llm_id, VISION: self.visual_encoder_id}.get(part)


@dataclass(frozen=True)
class Recipe:
    """One canonical tensor: the stored tensor it starts from, and the ops on the way."""

    tensor: StoredTensor
    ops: tuple[Op, ...] = ()
    origin: str = "checkpoint"

    def then(self, *ops: Op) -> Recipe:
        return replace(self, ops=self.ops + ops)

    @property
    def dtype(self) -> str:
        return self._result()[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._result()[1]

    def _result(self) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self.tensor.dtype, self.tensor.shape
        for op in self.ops:
            dtype, shape = op.result(dtype, shape)
        return dtype, shape


@dataclass(frozen=True)
class Model:
    """A checkpoint made whole, as far as a target asked for it.

    `recipes` holds the merged weights of each wanted part in module order; `configs` and `bases` are by part. `tied`
    says that the language model's head shares the embedding's weights. `added` is what an earlier conversion recorded
    as added to the vocabulary, while it has been taken off again.
    """

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    configs: Mapping[str, dict[str, Any]]
    bases: Mapping[str, Base]
    tied: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    added: Mapping[str, Any] | None = None

    def part(self, name: str) -> dict[str, Recipe]:
        """The recipes of one part, by canonical name."""
        return {k: v for k, v in self.recipes.items() if k.startswith(f"{name}.")}

    def folder(self, part: str) -> Path | None:
        """Where the part's tokenizer, processor and generation config lie."""
        own = self.checkpoint.parts[part].folder
        if own is not None:
            return own
        return self.bases[part].folder if part in self.bases else None


def assemble(
    checkpoint: Checkpoint,
    asked: Bases,
    *,
    weights: Iterable[str],
    configs: Iterable[str],
    optional_configs: Iterable[str] = (),
) -> Model:
    """The model that a target needs: the `weights` of some parts, the `configs` of some.

    Parts in `optional_configs` get their config when their base can be had. Raises InputError (exit 3) for what is
    missing or does not fit, UnsupportedError (exit 4) for unknown tensors.
    """
    wanted = tuple(weights)
    bases: dict[str, Base] = {}
    found_configs: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    for part in (LLM, VISION):
        if part in wanted or part in tuple(configs):
            _add_part(checkpoint, part, asked, bases, found_configs)
        elif part in tuple(optional_configs):
            try:
                _add_part(checkpoint, part, asked, bases, found_configs)
            except InputError as problem:
                warnings.append(f"{problem.message}: going on without its files")
    recipes: dict[str, Recipe] = {}
    dropped: list[Dropped] = []
    tied = False
    merged = 0
    for part in (LLM, VISION, PROJECTOR):
        if part not in wanted:
            continue
        expected = _expected(checkpoint, part, found_configs)
        if part in found_configs:
            _check_heads(part, found_configs[part])
        _refuse_unknown(checkpoint, part, expected)
        stored = _trained(checkpoint, part)
        if any(name not in stored and want.tied not in stored for name, want in expected.items()):
            # Only now: a fully trained part needs its base's config alone, not gigabytes of its weights.
            base = _base(checkpoint, part, asked, weights=True)
            if base is not None:
                bases[part] = base
                stored = {name: (tensor, "base") for name, tensor in base.tensors.items()} | stored
        part_recipes, part_tied = _recipes(part, expected, stored, bases.get(part))
        if any(recipe.origin == "base" for recipe in part_recipes.values()):
            _check_base(checkpoint, part, bases[part], expected, found_configs[part], warnings)
            dropped += bases[part].dropped
        _check_shapes(part, expected, part_recipes)
        merged += _merge(checkpoint, part, part_recipes, asked.lora_alpha.get(PART_WORDS[part]))
        if part == LLM and part_tied:
            tied = _tie(part_recipes, found_configs[LLM], warnings)
        recipes.update(part_recipes)
    if PROJECTOR in wanted:
        _check_joints(recipes, found_configs)
    if checkpoint.image_newline is not None and set(wanted) >= {LLM, PROJECTOR}:
        recipes[IMAGE_NEWLINE] = Recipe(checkpoint.image_newline)
    notes = [f"merged LoRA into {merged} modules"] if merged else []
    for part in wanted:
        adapter = checkpoint.parts[part].adapter
        unsure = disputed(adapter) if adapter is not None else []
        if unsure:
            warnings.append(
                f"rank_pattern and alpha_pattern match {grouped(unsure)} by different keys: peft 0.12, which xtuner "
                "trains with, then keeps the common alpha, and so does this conversion; later versions of peft do not"
            )
    return Model(checkpoint, recipes, found_configs, bases, tied, tuple(notes), tuple(warnings), tuple(dropped))


def without_added(model: Model) -> Model:
    """The model less the rows and tokens which an earlier conversion recorded as added to it."""
    added = (model.checkpoint.record or {}).get("added")
    if not isinstance(added, dict) or EMBEDDING not in model.recipes:
        return model
    rows = added["rows"]
    recipes, configs = dict(model.recipes), dict(model.configs)
    if recipes[EMBEDDING].shape[0] != rows["to"]:
        raise InputError(
            f"{model.checkpoint.root}: conversion.json records an embedding of {rows['to']} rows, "
            f"it has {recipes[EMBEDDING].shape[0]}",
            hint="delete conversion.json, which is of another model: the weights do not need it",
        )
    if rows["from"] < rows["to"]:
        for name in (EMBEDDING, HEAD):
            recipes[name] = recipes[name].then(TakeRows(rows["from"]))
        configs[LLM] = {**configs[LLM], "vocab_size": rows["from"]}
    return replace(model, recipes=recipes, configs=configs, added=added)


def _add_part(
    checkpoint: Checkpoint, part: str, asked: Bases, bases: dict[str, Base], configs: dict[str, dict[str, Any]]
) -> None:
    """Find the config of a part, in the checkpoint or in its base model."""
    own = checkpoint.parts[part]
    if own.config is not None:
        configs[part] = named_config(own.config, part, where=str(checkpoint.path))
        if asked.asked(part) is not None and (base := _base(checkpoint, part, asked, weights=False)) is not None:
            bases[part] = base  # for the files that the source lacks, a tokenizer say
        return
    if part == VISION and own.state == "full" and asked.asked(part) is None:
        # The official layout holds the tower's weights without its config.
        known = tower_config(own.weights, (checkpoint.record or {}).get("vision_config"))
        if known is not None:
            configs[part] = named_config({"_name_or_path": own.base, **known}, part, where=str(checkpoint.path))
            return
    base = _base(checkpoint, part, asked, weights=False)
    if base is None:
        raise InputError(
            f"the checkpoint holds no config of the {PART_NAMES[part]} and does not name its base model",
            hint=f"give its folder or hub id by --{PART_WORDS[part]}",
        )
    bases[part] = base
    configs[part] = base.config
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


def _base(checkpoint: Checkpoint, part: str, asked: Bases, *, weights: bool) -> Base | None:
    """The part's base model: the one that the user names, else the one that the source names."""
    explicit = asked.asked(part)
    name = explicit or checkpoint.parts[part].base
    if name is None:
        return None
    return find_base(part, name, checkpoint.path, explicit=explicit is not None, weights=weights)


def _expected(checkpoint: Checkpoint, part: str, configs: Mapping[str, dict[str, Any]]) -> dict[str, Expected]:
    if part != PROJECTOR:
        return family(part, configs[part]).tensors(configs[part])
    return architecture_for(PROJECTOR, "projector").tensors(projector_config(checkpoint.parts[PROJECTOR].weights))


def projector_config(weights: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Depth and sizes of a projector from its tensors: canonical names, indices counting the activations.

    Raises InputError when there is none or a linear layer is missing.
    """
    first = weights.get("projector.0.weight")
    if first is None or len(first.shape) != 2:
        raise InputError("the checkpoint holds no projector (projector.0.weight)")
    indices = [name.split(".")[1] for name in weights if name.count(".") == 2 and name.endswith(".weight")]
    last = max((int(i) for i in indices if i.isdecimal() and len(i) < 4), default=0)
    return {
        "model_type": "projector",
        "text_hidden_size": first.shape[0],
        "vision_hidden_size": first.shape[1],
        "steps": (last + 1) // 2,
        "depth": (last + 1) // 2 + 1,
        "bias": "projector.0.bias" in weights,
    }


def _trained(checkpoint: Checkpoint, part: str) -> dict[str, tuple[StoredTensor, str]]:
    """The whole tensors of a part that training left."""
    own = checkpoint.parts[part]
    found = {name: (tensor, own.origin) for name, tensor in own.weights.items()}
    if own.adapter is not None:
        found.update({name: (tensor, own.origin) for name, tensor in own.adapter.overrides.items()})
    return found


def _refuse_unknown(checkpoint: Checkpoint, part: str, known: Mapping[str, Expected]) -> None:
    own = checkpoint.parts[part]
    named = set(own.weights) | set(own.adapter.overrides if own.adapter else ())
    unknown = sorted(named - known.keys())
    if unknown:
        from difflib import get_close_matches

        lacking = [name for name, want in known.items() if name not in named and not want.tied]
        if own.state == "full" and lacking:
            raise InputError(
                f"the config and the tensors of the {PART_NAMES[part]} are of different families: the config wants "
                f"{grouped(lacking, limit=4)}, which are not there; there are {grouped(unknown, limit=4)} instead",
                hint=f"get config and weights of one model, or give the base by --{PART_WORDS[part]}",
            )
        close = get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        raise UnsupportedError(
            f"the {PART_NAMES[part]} has {len(unknown)} tensors that its family does not know: {grouped(unknown)}"
            + (f"; nearest known name: {close[0]}" if close else "")
        )


def _recipes(
    part: str, expected: Mapping[str, Expected], stored: Mapping[str, tuple[StoredTensor, str]], base: Base | None
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
            recipes[name] = Recipe(found[0], (), found[1])
    if missing:
        where = f"neither the checkpoint nor the base {base.folder.name} has" if base else "the checkpoint lacks"
        raise InputError(
            f"{where} {len(missing)} tensor{'s' if len(missing) > 1 else ''} of the {PART_NAMES[part]}: "
            f"{grouped(missing)}",
            hint=None if part == PROJECTOR else f"give a base model that has them by --{PART_WORDS[part]}",
        )
    return recipes, tied


def _check_shapes(part: str, expected: Mapping[str, Expected], recipes: Mapping[str, Recipe]) -> None:
    wrong = [(name, want.shape, recipes[name]) for name, want in expected.items() if recipes[name].shape != want.shape]
    if not wrong:
        return
    rows = [f"  {printable(n)}: config {list(s)}, {r.origin} {list(r.tensor.shape)}" for n, s, r in wrong[:8]]
    more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    empty = any(r.tensor.numel == 0 for _, _, r in wrong)
    raise InputError(
        f"the config and the tensors of the {PART_NAMES[part]} disagree:\n" + "\n".join(rows) + more,
        hint="empty tensors are what a ZeRO-3 run leaves when it saves without gathering" if empty else None,
    )


def _merge(checkpoint: Checkpoint, part: str, recipes: dict[str, Recipe], alpha: float | None) -> int:
    """Put the LoRA of a part on its recipes; every module must find its weight. Returns how many did."""
    adapter = checkpoint.parts[part].adapter
    if adapter is None:
        return 0
    unmatched = [module for module in adapter.modules if f"{module}.weight" not in recipes]
    if unmatched:
        raise InputError(
            f"the LoRA of the {PART_NAMES[part]} adapts {len(unmatched)} modules that the model does not have: "
            f"{grouped(unmatched)}"
        )
    for module, lora in adapter.modules.items():
        recipe = recipes[f"{module}.weight"]
        shape = recipe.shape
        columns = 1
        for size in shape[1:]:
            columns *= size
        if lora.b.shape[0] != shape[0] or lora.a.numel != lora.rank * columns:
            raise InputError(
                f"the LoRA of {module} does not fit: A {list(lora.a.shape)}, B {list(lora.b.shape)}, "
                f"weight {list(shape)}; was it trained on another base model?"
            )
        op = adapter.merge_op(f"{module}.weight", alpha)
        if op is not None:
            recipes[f"{module}.weight"] = recipe.then(op)
    return len(adapter.modules)


def _check_base(
    checkpoint: Checkpoint,
    part: str,
    base: Base,
    expected: Mapping[str, Expected],
    config: Mapping[str, Any],
    warnings: list[str],
) -> None:
    """Whether a base whose weights are used is whole and the one that the checkpoint was trained on, as far as told."""
    kin = family(part, config)
    strange = [name for name in base.tensors if name not in expected and kin.dropped(name) is None]
    if strange:
        raise UnsupportedError(
            f"the base {PART_NAMES[part]} {base.folder} has {len(strange)} tensors that its family does not know: "
            f"{grouped(strange)}",
            hint=f"give the full-precision model by --{PART_WORDS[part]}",
        )
    own = checkpoint.parts[part]
    if own.adapter is not None:
        _refuse_second_merge(checkpoint, part, base)
    if (
        own.base is not None
        and base.id is not None
        and is_id(own.base)
        and not is_folder(own.base, checkpoint.path)
        and published_id(own.base) != base.id
    ):
        warnings.append(f"the {PART_NAMES[part]} was trained on {own.base}, the base given is {base.id}")


def _refuse_second_merge(checkpoint: Checkpoint, part: str, base: Base) -> None:
    """A base that was itself made by merging this very adapter is told by its conversion.json."""
    file = base.folder / "conversion.json"
    record = read_json(file) if file.is_file() else None
    if not isinstance(record, dict) or "merge_lora" not in str(record.get("tensors")):
        return
    sources = str(record.get("sources"))
    if any(str(found["sha256"]) in sources for found in identity(checkpoint.files)):
        raise UnsupportedError(
            f"the base {PART_NAMES[part]} {base.folder} has the LoRA of {checkpoint.path.name} merged in already",
            hint=f"give the base model that it was trained on by --{PART_WORDS[part]}",
        )


def _tie(recipes: dict[str, Recipe], config: dict[str, Any], warnings: list[str]) -> bool:
    """Whether the head really equals the embedding; a different one is kept and the config told so."""
    head, embedding = recipes[HEAD], recipes[EMBEDDING]
    if head == embedding or head.tensor.extents == embedding.tensor.extents:
        recipes[HEAD] = embedding
        return True
    if head.tensor.dtype == embedding.tensor.dtype and not head.ops and not embedding.ops:
        with FilePool() as pool:
            if same_bytes(pool, head.tensor, embedding.tensor):
                recipes[HEAD] = embedding
                return True
    warnings.append("lm_head differs from embed_tokens although the config ties them: both are kept, untied")
    config["tie_word_embeddings"] = False
    return False


def _check_heads(part: str, config: Mapping[str, Any]) -> None:
    """Tensors do not show how they are split into heads: a config that splits them wrongly fits every shape."""
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    whole, share = ("num_attention_heads", "num_key_value_heads")
    if groups is None:
        if config.get("head_dim") is not None:
            return
        heads, groups, whole, share = config.get("hidden_size"), heads, "hidden_size", "num_attention_heads"
    if not isinstance(heads, int) or not isinstance(groups, int) or groups < 1 or heads % groups:
        raise InputError(f"config of the {PART_NAMES[part]}: {whole} {heads} does not divide by {share} {groups}")


def _check_joints(recipes: Mapping[str, Recipe], configs: Mapping[str, dict[str, Any]]) -> None:
    """The projector must fit between the tower and the language model."""
    first = recipes["projector.0.weight"].shape
    for part, size, what in ((VISION, first[1], "reads"), (LLM, first[0], "writes")):
        config = configs.get(part)
        if config is not None and config["hidden_size"] != size:
            raise InputError(
                f"the projector {what} {size} features but the {PART_NAMES[part]} has {config['hidden_size']}: "
                "they are not of one model",
                hint=f"give the base model it was trained with by --{PART_WORDS[part]}",
            )
