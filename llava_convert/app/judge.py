"""Whether two models are computed, prompted and stopped alike, as far as their small files and metadata say.

OUT is held against what a conversion of the source to OUT's layout would write: configs by resolved values (defaults
of the family filled in), tokenizers by what they encode, the rest key by key. The tables of `mappings/facts` say which
keys decide; one that no table knows counts as if it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llava_convert.assets.processor import preprocessor_config
from llava_convert.assets.tokenizer.compare import compare_tokenizers
from llava_convert.assets.tokenizer.files import Tokenizer, has_tokenizer, open_tokenizer
from llava_convert.layouts.registry import layout
from llava_convert.model.adapter import Adapter
from llava_convert.model.checkpoint import LLM, PART_NAMES, PROJECTOR, VISION, Checkpoint
from llava_convert.model.configs import named_config
from llava_convert.model.facts import BIAS, CLASS_TOKEN, DEPTH, LAYER, NEWLINE, TEMPLATE, dialect_for, value_of
from llava_convert.model.judgement import Judgement, alike
from llava_convert.model.projector import projector_config
from llava_convert.model.recipe import Model
from llava_convert.model.tables.facts import KeyTable, facts, key_table, tables_of
from llava_convert.model.tables.types import read_config
from llava_convert.model.target import Target
from llava_convert.storage.sidecars import Sidecars, folder_sidecars, made_sidecars


def judge(model: Model, target: Target, theirs: Checkpoint, held: Iterable[str]) -> Judgement:
    """Hold OUT, opened as `theirs`, against the model and what `target` would write of it; `held` are OUT's parts."""
    found, parts = Judgement(), set(held)
    if theirs.bare:  # an adapter: all else is its base's
        _compare_all_adapters(found, model, theirs, parts)
        return found
    _compare_facts(found, model, theirs, parts)
    stated = getattr(layout(theirs.layout), "compare_stated", None)
    if stated is not None:  # its small files are made of metadata, which is compared itself
        stated(found, target, theirs)
        return found
    for part in (LLM, VISION):
        if part in parts and part in model.configs:
            _compare_config(found, part, model, theirs)
    _compare_all_adapters(found, model, theirs, parts)
    _compare_files(found, model, target.files, theirs)
    for key, value in theirs.unknown_keys.items():
        found.compare(key, model.checkpoint.unknown_keys.get(key), value)
    _allow_fewer_stops(found, theirs)
    _allow_another_eos(found, target)
    return found


def _allow_fewer_stops(found: Judgement, theirs: Checkpoint) -> None:
    """Readers that take a prompt template by its name stop where that says, so that OUT need not have its ids."""
    name = "generation_config.json: eos_token_id"
    gap = found.different.get(name)
    if gap is None or not _silent(theirs) or theirs.record is not None:
        return
    said, wanted = _ids(gap.out), _ids(gap.source)
    if said <= wanted and said != {None}:
        del found.different[name]
        found.not_compared.append("the stop ids of the prompt template, which readers of OUT take by its name")


def _allow_another_eos(found: Judgement, target: Target) -> None:
    """A model's config names one stop id where generation_config has all, and releases differ in which."""
    name, stops = f"{LLM}.eos_token_id", "generation_config.json: eos_token_id"
    gap, data = found.different.get(name), target.files.get("generation_config.json")
    if gap is None or data is None or stops in found.different:
        return
    every = json.loads(data).get("eos_token_id")
    if _ids(gap.out) <= _ids(every):
        del found.different[name]
        found.harmless[name] = "it is among the stop ids of generation_config.json"


def _ids(value: Any) -> set[Any]:
    return set(value) if isinstance(value, list) else {value}


def _silent(theirs: Checkpoint) -> bool:
    """Whether readers of OUT take the prompt template from elsewhere."""
    word = facts()[TEMPLATE].layouts.get(theirs.layout)
    return word is not None and word.silent


def _compare_facts(found: Judgement, model: Model, theirs: Checkpoint, parts: set[str]) -> None:
    blocks: tuple[int, int] | None = None
    if VISION in model.configs:
        tower = model.configs[VISION]
        theirs, seen = theirs.with_tower({**tower, **(theirs.parts[VISION].config or {})})
        blocks = int(tower["num_hidden_layers"]), int(seen["num_hidden_layers"])
    mine, other = dict(model.facts), dict(theirs.settings.facts)
    weights = theirs.parts[PROJECTOR].weights
    if weights and PROJECTOR in parts:
        sizes = projector_config(weights)
        other = {DEPTH: sizes["depth"], BIAS: sizes["bias"], **other}  # what its config says counts for its readers
    other[NEWLINE] = theirs.image_newline is not None
    if blocks is not None:
        for said, count in zip((mine, other), blocks, strict=True):  # one layer has one number, however it is counted
            said[LAYER] = value_of(said, LAYER) % (count + 1)
    if CLASS_TOKEN in mine:
        other[CLASS_TOKEN] = mine[CLASS_TOKEN]  # the tower's class says it, and the configs are compared
    dialect = dialect_for(theirs.layout, other)
    for fact in facts().values():
        if not _about(fact.name, parts) or fact.name == TEMPLATE:
            continue
        ours, word = fact.layouts.get(model.checkpoint.layout), fact.layouts.get(dialect)
        value = value_of(mine, fact.name)
        if (word is not None and (word.silent or (word.loses and fact.matters(mine)))) or (
            ours is not None and ours.silent
        ):
            found.not_compared.append(fact.what)
        elif word is not None and word.key is None:
            if fact.matters(mine) and value not in word.unsaid:
                found.differ(fact.name, value, word.unsaid[0] if word.unsaid else None)
        elif fact.matters(mine) or fact.matters(other):
            found.compare(fact.name, value, value_of(other, fact.name))


def _about(name: str, parts: set[str]) -> bool:
    """Whether a fact is one of a model that holds these parts."""
    scope = name.partition(".")[0]
    return {"projector": PROJECTOR, "prompt": LLM}.get(scope, VISION) in parts


def _compare_config(found: Judgement, part: str, model: Model, theirs: Checkpoint) -> None:
    own = theirs.parts[part].config
    if own is None:
        found.not_compared.append(f"the config of the {PART_NAMES[part]}, which OUT does not hold")
        return
    mine, other = _plain(model.configs[part]), _plain(named_config(own, part, where=str(theirs.path)))
    if part == LLM:
        rows = theirs.parts[LLM].weights.get(model.embedding)
        said = other.pop("vocab_size", None)
        mine.pop("vocab_size", None)  # of the source: OUT may have more, and its tensors are compared
        if rows is not None:
            found.compare(f"{LLM}.vocab_size", rows.shape[0], said)
    found.compare_keys(f"{part}.", [key_table(part), key_table("common")], mine, other)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with one spelling of a rope scaling, and with what follows from other keys written out."""
    found = dict(config)
    scaling = found.get("rope_scaling")
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type") or scaling.get("type")
        rest = {key: value for key, value in scaling.items() if key not in ("rope_type", "type", "rope_theta")}
        found["rope_scaling"] = None if kind in (None, "default") else {"type": kind, **rest}
    heads, size = found.get("num_attention_heads"), found.get("hidden_size")
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = heads
    if found.get("head_dim") is None and isinstance(heads, int) and isinstance(size, int) and heads:
        found["head_dim"] = size // heads
    layers = found.get("layer_types")
    if isinstance(layers, list) and set(layers) == {"full_attention"}:
        found["layer_types"] = None
    if not found.get("use_sliding_window", True):
        found["sliding_window"] = found["max_window_layers"] = None  # a window that nothing looks through
    return found


def _compare_all_adapters(found: Judgement, model: Model, theirs: Checkpoint, parts: Iterable[str]) -> None:
    for part in sorted(parts):
        mine, other = model.checkpoint.parts[part].adapter, theirs.parts[part].adapter
        if mine is not None and other is not None:
            _compare_adapters(found, mine, other)


def _compare_adapters(found: Judgement, mine: Adapter, other: Adapter) -> None:
    """By what each module's LoRA counts: configs may spell the same factors in several ways."""
    for module in sorted(mine.modules.keys() & other.modules.keys()):
        found.compare(f"{module}: alpha / r", mine.scale(module), other.scale(module))
        found.compare(f"{module}: DoRA", _is_dora(mine, module), _is_dora(other, module))


def _is_dora(adapter: Adapter, module: str) -> bool:
    stated = adapter.settings is not None and adapter.settings.use_dora
    return stated or adapter.modules[module].magnitude is not None


def _compare_pictures(found: Judgement, mine: dict[str, Any], beside: Sidecars, tower: Mapping[str, Any]) -> None:
    """How a picture becomes pixels, as its readers take it: with the defaults of the tower's own processor."""
    names = ("preprocessor_config.json", "processor_config.json")  # which holds both from 5.0 on
    other = next((read_config(beside, name) for name in names if beside.has(name)), {})
    sides = (preprocessor_config(side, tower, kind="clip", for_hf=False) for side in (mine, other))
    found.compare_keys(f"{names[0]}: ", [key_table("processor"), key_table("common")], *sides)


def _compare_files(found: Judgement, model: Model, files: Mapping[str, bytes], theirs: Checkpoint) -> None:
    """The small files of OUT beside those that a conversion would write."""
    made, beside = _top(files, theirs), theirs.beside
    for name, data in sorted(files.items()):
        tables = tables_of(theirs.layout, name) if name.endswith(".json") else []
        folder, _, last = name.rpartition("/")
        around = folder_sidecars(theirs.root / folder) if folder else beside
        if last == "preprocessor_config.json":
            _compare_pictures(found, json.loads(data), around, model.configs[VISION])
        elif tables and last != "tokenizer_config.json":  # which is compared with the tokenizer
            _compare_file(found, name, json.loads(data), last, around, tables, made)
    if not has_tokenizer(made):
        return
    if has_tokenizer(beside):
        exact = theirs.record is not None
        template = exact or not _silent(theirs)
        mine = open_tokenizer(made)
        compare_tokenizers(found, mine, open_tokenizer(beside, mine), exact=exact, template=template)
    else:
        found.differ("tokenizer", "there is one", None)


def _compare_file(
    found: Judgement,
    name: str,
    mine: dict[str, Any],
    last: str,
    beside: Sidecars,
    tables: list[KeyTable],
    made: Sidecars,
) -> None:
    if not beside.has(last):
        for key, value in mine.items():
            if not alike(value, None) and any(table.kind(key) in ("stops", "computes") for table in tables):
                found.differ(f"{name}: {key}", value, None)
        return
    other = read_config(beside, last)
    own = any(table.layout is not None for table in tables)
    if own:  # the other keys of such a file are the language model's, which has been compared
        mine, other = (
            {key: value for key, value in side.items() if any(table.knows(key) for table in tables)}
            for side in (mine, other)
        )
        ours = open_tokenizer(made) if has_tokenizer(made) else None
        theirs = open_tokenizer(beside, ours) if has_tokenizer(beside) else None
        mine, other = _with_texts(mine, ours), _with_texts(other, theirs)
        for key in (
            "pad_token_id",
            "vocab_size",
        ):  # releases from 5.0 on leave them to the tokenizer and to text_config
            mine = mine if key in other else {name: value for name, value in mine.items() if name != key}
    found.compare_keys("" if own else f"{name}: ", [*tables, key_table("common")], mine, other)


def _with_texts(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ids of tokens as the texts that they stand for: another converter may give a token another id."""
    found, texts = dict(config), {} if tokenizer is None else tokenizer.texts
    if "image_token_id" in found:
        found.setdefault("image_token_index", found.pop("image_token_id"))
    for key in ("image_token_index", "pad_token_id"):
        if key in found:
            found[key] = texts.get(found[key], found[key])
    return found


def _top(files: Mapping[str, bytes], theirs: Checkpoint) -> Sidecars:
    top = {name: data for name, data in files.items() if "/" not in name}
    return made_sidecars(theirs.root, lambda: top)
