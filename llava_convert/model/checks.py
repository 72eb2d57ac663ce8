"""Whether the tensors, configs and bases of a model belong together. Every check says what mends it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.hub_names import is_id, last_name, published_id
from llava_convert.core.text import printable
from llava_convert.model.bases import Base, is_folder
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, PROJECTOR, VISION, Checkpoint
from llava_convert.model.configs import family
from llava_convert.model.facts import BIAS, DEPTH, LAYER, key_of, spelled
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Recipe
from llava_convert.model.record import merged_already
from llava_convert.model.tables.facts import facts
from llava_convert.model.tables.families import Expected, architecture_for, architectures
from llava_convert.model.tables.names import grouped
from llava_convert.model.tables.unknown_families import by_id, by_tensors


def refuse_unknown_family(checkpoint: Checkpoint, parts: Iterable[str]) -> None:
    """Raise UnsupportedError (exit 4) for a part of a family that no table has, by the family's own name.

    It is told by the model type of the part's config, else by the names of its tensors; those that no layout gives a
    meaning may be the language model's, or a tower's where there is no other.
    """
    for part in parts:
        own = checkpoint.parts[part]
        if own.config is not None and isinstance(kind := own.config.get("model_type"), str):
            architecture_for(part, kind)
        adapted = {f"{module}.weight" for adapter in own.adapters for module in adapter.modules}
        names = own.names | adapted | {name for adapter in own.adapters for name in adapter.overrides}
        if checkpoint.extra is not None and (part == LLM or not names):
            names |= set(checkpoint.extra.names)
        if (what := by_tensors(part, names)) is not None:
            raise _of_unknown_family(part, str(checkpoint.path), what)


def refuse_unknown_base(part: str, name: str) -> None:
    """Raise UnsupportedError (exit 4) for a base that cannot be had, whose name is that of a family no table has."""
    if (what := by_id(part, name)) is not None:
        raise _of_unknown_family(part, f"the base {printable(name)}", what)


def _of_unknown_family(part: str, where: str, what: str) -> UnsupportedError:
    known = sorted(table.name for table in architectures().values() if table.part == part)
    return UnsupportedError(
        f"{where}: the {PART_NAMES[part]} is {what}, a family that this tool does not convert",
        hint=f"known: {', '.join(known)}; --part projector (or llm, visual-encoder) takes another part alone; a new "
        "family is one table, which --table FILE.toml adds",
    )


def refuse_unknown(checkpoint: Checkpoint, part: str, known: Mapping[str, Expected]) -> None:
    own = checkpoint.parts[part]
    named = own.names | {name for adapter in own.adapters for name in adapter.overrides}
    unknown = sorted(named - known.keys())
    if unknown:
        lacking = [name for name, want in known.items() if name not in named and not want.tied]
        if own.state == "full" and lacking:
            raise InputError(
                f"the config and the tensors of the {PART_NAMES[part]} are of different families: the config wants "
                f"{grouped(lacking, limit=4)}, which are missing; there are {grouped(unknown, limit=4)} instead",
                hint=f"get config and weights of one model, or give the base by --{PART_WORDS[part]}",
            )
        close = get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        raise UnsupportedError(
            f"the {PART_NAMES[part]} has {len(unknown)} tensors that its family does not know: {grouped(unknown)}"
            + (f"; nearest known name: {close[0]}" if close else "")
        )


def check_shapes(part: str, expected: Mapping[str, Expected], recipes: Mapping[str, Recipe]) -> None:
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


def check_base(
    checkpoint: Checkpoint,
    part: str,
    base: Base,
    expected: Mapping[str, Expected],
    config: Mapping[str, Any],
    warnings: list[str],
) -> None:
    """Whether a base whose weights are used is whole and the one that the checkpoint was trained on, as far as told."""
    kin = family(part, config)
    # A tower that was cut short has a base with more blocks than it needs.
    known = expected.keys() | family(part, base.config).tensors(base.config).keys()
    strange = [name for name in base.weights_part.names if name not in known and kin.dropped(name) is None]
    if strange:
        raise UnsupportedError(
            f"the base {PART_NAMES[part]} {base.folder} has {len(strange)} tensors that its family does not know: "
            f"{grouped(strange)}",
            hint=f"give the full-precision model by --{PART_WORDS[part]}",
        )
    own = checkpoint.parts[part]
    if own.adapter is not None:
        _refuse_second_merge(checkpoint, part, base)
    if own.base is not None and not _may_be(own.base, base, checkpoint):
        warnings.append(
            f"the {PART_NAMES[part]} was trained on {own.base}, and the base given is {base.id or base.asked}: if they "
            "are not the same model, the output is neither"
        )


def _may_be(named: str, base: Base, checkpoint: Checkpoint) -> bool:
    """Whether a base can be the model that a source names: by its id, else by its last name, or what its config says.

    A config that says nothing contradicts the name for an adapter alone: what was frozen is the published model.
    """
    if base.id is not None and is_id(named) and not is_folder(named, checkpoint.path):
        return published_id(named) == base.id
    own, wanted = base.config.get("_name_or_path"), _last_name(named)
    if wanted in {_last_name(str(name)) for name in (base.asked, base.folder, own) if name}:
        return True
    return not own and checkpoint.parts[base.part].adapter is None


def _last_name(name: str) -> str:
    return last_name(name).lower()


def _refuse_second_merge(checkpoint: Checkpoint, part: str, base: Base) -> None:
    """A base that was itself made by merging this very adapter is told by its conversion.json."""
    if merged_already(base.files, checkpoint.files):
        raise UnsupportedError(
            f"the LoRA of {checkpoint.path.name} is already merged into the base {PART_NAMES[part]} {base.folder}",
            hint=f"give the base model that it was trained on by --{PART_WORDS[part]}",
        )


def check_heads(part: str, config: Mapping[str, Any]) -> None:
    """Tensors do not show how they are split into heads: a config that splits them wrongly fits every shape."""
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    whole, share = ("num_attention_heads", "num_key_value_heads")
    if groups is None:
        if config.get("head_dim") is not None:
            return
        heads, groups, whole, share = config.get("hidden_size"), heads, "hidden_size", "num_attention_heads"
    if not isinstance(heads, int) or not isinstance(groups, int) or groups < 1 or heads % groups:
        raise InputError(f"config of the {PART_NAMES[part]}: {whole} {heads} does not divide by {share} {groups}")


def check_joints(recipes: Mapping[str, Recipe], configs: Mapping[str, dict[str, Any]]) -> None:
    """The projector must fit between the tower and the language model."""
    first = recipes["projector.0.weight"].shape
    for part, size, what in ((VISION, first[1], "reads"), (LLM, first[0], "writes")):
        config = configs.get(part)
        if config is not None and config["hidden_size"] != size:
            raise InputError(
                f"the projector {what} {size} features but the {PART_NAMES[part]} has {config['hidden_size']}: "
                "they belong to different models",
                hint=f"give the base model it was trained with by --{PART_WORDS[part]}",
            )


def check_layer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """The layer that the projector reads must be one that the tower has, counted from the front or from the end."""
    layer, blocks = checkpoint.settings.select_layer, int(config["num_hidden_layers"])
    if -(blocks + 1) <= layer <= blocks:
        return
    raise InputError(
        f"{checkpoint.path}: {key_of(LAYER, checkpoint.layout)} is {layer}, but the vision tower has {blocks} blocks: "
        f"its layers are 0 to {blocks}, or -1 to -{blocks + 1} from the end",
        hint="get the config that the model was trained with, or its vision tower by --visual-encoder",
    )


def check_projector(checkpoint: Checkpoint) -> None:
    """What the source's config says of the projector must be what its tensors are."""
    sizes = projector_config(checkpoint.parts[PROJECTOR].weights)
    for name, found in ((DEPTH, sizes["depth"]), (BIAS, sizes["bias"])):
        said = checkpoint.settings.said.get(name, found)
        if said != found:
            raise InputError(
                f"{checkpoint.path}: {key_of(name, checkpoint.layout)} is {spelled(said)} ({facts()[name].what}), but "
                f"the projector's tensors say {spelled(found)}",
                hint="get the config and the weights of the same model",
            )
