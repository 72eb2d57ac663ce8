"""What a GGUF architecture calls its tensors and settings, as data (`mappings/gguf/*.toml`), read in both directions.

A row pairs a GGUF name with a canonical one, as a layout's does, and may say what happens to the tensor's rows, or that
one tensor is several on the other side. A key pairs an entry of the metadata with one of transformers' config. Where
llama.cpp has an architecture for one family alone, its table can be the section `[gguf]` of the family's own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.resources import data_dir
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.values import dataclass
from llava_convert.layouts.gguf import limits, rope, vision
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION
from llava_convert.model.recipe import Recipe
from llava_convert.model.renaming import Renamed, Symbol, groups_of, moves, part_of, piece, renamed
from llava_convert.model.tables.added import ARCHITECTURE as FAMILIES
from llava_convert.model.tables.added import AddedTable, added_tables
from llava_convert.model.tables.families import architecture_for, architectures
from llava_convert.model.tables.names import CANONICAL, DISK, LayoutTable, make_layout_table
from llava_convert.model.tables.patterns import TableError
from llava_convert.ops.base import Op
from llava_convert.ops.join import Part
from llava_convert.storage.gguf.file import Typed

Config = Mapping[str, Any]
Metadata = Mapping[str, Typed]
CLIP = "clip"
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "use_qkv_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
# Phi-3's class takes a padding id of its own, 32000, where the config does not say one.
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of the metadata. `symbol` is the shape symbol that it is computed by, where config alone does not say.

    `default` is what a file that lacks it means (the name of another config key, or a value); without one, and unless
    `optional`, it must be there. `null` is how the config's null is written. Families in `stated` have it only where
    their config says it. `share_of`: what is written is the config's share of that symbol. `when`: it is
    there only where that entry of the config is true, and says so on the way back.
    """

    key: str
    type: str
    config: str = ""
    symbol: str = ""
    default: Any = None
    optional: bool = False
    null: Any = None
    stated: tuple[str, ...] = ()
    share_of: str = ""
    when: str = ""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a tensor of a file is: `name` is canonical, or that of a part of `whole`; `take` is which rows of it.

    `others` are the names of all of the whole's parts, in order, and `groups` is how their rows follow each other.
    """

    name: str
    ops: tuple[Op, ...]
    take: Part | None = None
    whole: str = ""
    others: tuple[str, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class GgufTable:
    """One architecture's names and keys. `families` are the model types it holds.

    Reading gives the first, or the one that a key of `family_by` tells, or a tensor of `family_without` by its absence.
    """

    architecture: str
    families: tuple[str, ...]
    names: LayoutTable
    keys: tuple[Key, ...]
    family_by: Mapping[str, str]
    family_without: Mapping[str, str]

    @property
    def part(self) -> str:
        return VISION if self.architecture == CLIP else PROJECTOR if self.families == ("projector",) else LLM

    def written(self, recipes: Mapping[str, Recipe], config: Config) -> list[Renamed]:
        """Recipes by GGUF name, less those that are not written; raises what `renamed` raises."""
        kept = {name: recipe for name, recipe in recipes.items() if self.omits(name) is None}
        return renamed(kept, self.names, self._symbol(config), side=CANONICAL)

    def disk_names(self, canonical: str) -> list[str]:
        """What a tensor is called in a file: by several names where it is in parts, by none where no row has it."""
        return [disk for disk, row in self.names.named(canonical, CANONICAL) if not row.omit]

    def omits(self, canonical: str) -> str | None:
        """Why a tensor is not written, or None where it is."""
        return next((row.omit for _, row in self.names.named(canonical, CANONICAL) if row.omit), None)

    def read(self, disk: str, shape: tuple[int, ...], config: Config) -> list[Meaning]:
        """What a GGUF tensor of that shape is, with the ops that undo what writing did; nothing for an unknown name."""
        found: list[Meaning] = []
        symbol = self._symbol(config)
        for canonical, row in self.names.named(disk, DISK):
            ops, fused = moves(row, symbol, side=DISK), row.fused
            if fused is None:
                found.append(Meaning(canonical, ops))
            elif fused.whole == DISK:
                found.append(Meaning(canonical, ops, take=part_of(fused, shape, symbol)))
            else:
                others = tuple(f"{canonical}[{i}]" for i in range(len(fused.shares)))
                groups = groups_of(fused, symbol)
                found.append(Meaning(piece(canonical, fused), ops, None, canonical, others, groups))
        return found

    def dropped(self, disk: str) -> str | None:
        """Why a tensor is left behind when it is read (it says what the config says), or None."""
        return self.names.dropped(disk)

    def _symbol(self, config: Config) -> Symbol:
        kind = str(config.get("model_type", self.families[0]))
        return lambda name: architecture_for(self.part, kind).symbol(name, config)


def tables() -> tuple[GgufTable, ...]:
    """Every table of `mappings/gguf`, and those that families carry in their own. Raises TableError."""
    return _tables(added_tables(FAMILIES))


@cache
def _tables(added: tuple[AddedTable, ...]) -> tuple[GgufTable, ...]:
    paths = sorted((data_dir("mappings") / "gguf").glob("*.toml"))
    found = [parse_gguf_table(path.read_text(encoding="utf-8"), path) for path in paths]
    for family in architectures().values():
        if (raw := family.sections.get("gguf")) is not None:
            text = family.path.read_text(encoding="utf-8")
            found.append(_gguf_table({**raw, "families": list(family.model_types)}, text, family.path))
    known = [table for table in found if table is not None]
    for table in known:
        if sum(one.architecture == table.architecture for one in known) > 1:
            raise TableError(f"the GGUF architecture {table.architecture} has two tables")
    return tuple(known)


def dialects() -> list[str]:
    """The architectures, each of which has names of its own."""
    return sorted(table.architecture for table in tables())


def family_name(model_type: str) -> str | None:
    """The architecture that a family is written as, None where there is none."""
    return next((table.architecture for table in tables() if model_type in table.families), None)


def parse_gguf_table(text: str, path: Path) -> GgufTable | None:
    """One table; None for a file of the folder that holds something else. Raises TableError for a contradiction."""
    raw = tomllib.loads(text)
    return _gguf_table(raw, text, path) if "families" in raw else None


def _gguf_table(raw: Mapping[str, Any], text: str, path: Path) -> GgufTable:
    stated = {"layout": raw["architecture"], "writes": "gguf"}
    return GgufTable(
        raw["architecture"],
        tuple(raw["families"]),
        make_layout_table({**raw, **stated}, text, path),
        tuple(Key(**{**key, "stated": tuple(key.get("stated", ()))}) for key in raw.get("key", ())),
        raw.get("family_by", {}),
        raw.get("family_without", {}),
    )


def table_for_family(model_type: str) -> GgufTable:
    """The table that a family is written by. Raises UnsupportedError (exit 4) for one that GGUF cannot hold here."""
    for table in tables():
        if model_type in table.families:
            return table
    raise UnsupportedError(
        f"a {model_type} cannot be written as GGUF",
        hint=_known(),
    )


def table_for_arch(architecture: str) -> GgufTable:
    """The table of `general.architecture`. Raises UnsupportedError (exit 4) for others."""
    for table in tables():
        if table.architecture == architecture and table.families != ("projector",):
            return table
    raise UnsupportedError(f"GGUF architecture {architecture!r} is not supported", hint=_known())


def _known() -> str:
    return "known: " + ", ".join(sorted(f for table in tables() for f in table.families if f != "projector"))


def metadata_of(table: GgufTable, config: Config) -> dict[str, Typed]:
    """The keys that a config makes; those of the tokenizer and the general ones are others' work.

    Raises UnsupportedError (exit 4) for what llama.cpp does not compute: rope scalings, activations, sizes of heads.
    """
    found: dict[str, Typed] = {}
    family = architecture_for(table.part, str(config["model_type"]))
    for key in table.keys:
        if family.name in key.stated and config.get(key.config) is None:
            continue
        if key.when and not config.get(key.when):
            continue
        value: Any
        if key.share_of:
            value = int(family.symbol(key.share_of, config) * limits.rotated_share(config))
        else:
            value = family.symbol(key.symbol, config) if key.symbol else config.get(key.config)
        value = key.null if value is None else value
        if value is None and isinstance(key.default, str):
            value = config.get(key.default)
        if value is not None:
            found[key.key] = Typed(key.type, float(value) if key.type == "f32" else value)
        elif not key.optional:
            raise InputError(f"the config lacks {key.config}, which GGUF needs as {key.key}")
    if table.part == VISION:
        vision.refuse(config)
        return found | vision.activation_keys(config)
    limits.refuse(table.architecture, [key.config for key in table.keys], config, family)
    return found | rope.scaling_keys(table.architecture, config)


def config_of(table: GgufTable, metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """transformers' config (old flavour) of a file. Raises InputError for keys that are missing or of a wrong type.

    UnsupportedError where the rope scaling cannot be told from its factors.
    """
    said = [family for key, family in table.family_by.items() if key in metadata]
    said += [family for name, family in table.family_without.items() if name not in tensors]
    told = [*said, table.families[0]][0]
    family = architecture_for(table.part, told)
    config: dict[str, Any] = {"model_type": told}
    for key in table.keys:
        if not key.config:
            continue
        typed = metadata.get(key.key)
        if key.share_of:
            continue  # of a symbol that needs the whole config
        if typed is not None:
            value = None if key.null is not None and typed.value == key.null else _plain(key, typed)
        elif key.optional:
            continue
        elif key.default is None:
            raise InputError(f"the GGUF lacks {key.key}", hint="it is incomplete; get it again")
        else:
            value = config.get(key.default) if isinstance(key.default, str) else key.default
            value = None if key.null is not None and value == key.null else value
        config[key.config] = value
        if key.when:
            config[key.when] = True
    if table.part == VISION:
        return config | vision.config_of_rest(metadata, family)
    words, out = ([*table.disk_names(role), ""][0] for role in (family.embedding, family.head))
    if words in tensors:
        config["vocab_size"] = tensors[words].shape[0]
    config["tie_word_embeddings"] = out not in tensors
    config |= {key: tensor in tensors for key, tensor in _BIASES.items() if key in family.defaults}
    for name, short in _IDS.items():
        typed = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if name in family.defaults or name != "pad_token_id":
            config[name] = typed.value if typed is not None else None
    head = family.symbol("head_dim", config)
    for key in (key for key in table.keys if key.share_of and key.key in metadata):
        size = family.symbol(key.share_of, config)
        if (rotated := _plain(key, metadata[key.key])) != size:
            config[key.config] = rotated / size
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]  # written out in every file, and told by the others in most configs
    config |= limits.implied(table.architecture, config, family)
    scaling = rope.read_scaling(table.architecture, metadata, tensors, config, head)
    config["rope_scaling"] = scaling
    return config


def _plain(key: Key, typed: Typed) -> Any:
    """A value as configs write it: of a float32 the shortest decimal that means it."""
    value = typed.value
    if isinstance(value, list | tuple):  # one for each layer, in newer files
        if len(set(value)) != 1:
            raise UnsupportedError(f"{key.key} differs between layers, and no supported family has that")
        value = value[0]
    if key.type == "bool" and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key.key} should be a number, found {str(value)[:40]!r}")
    return float(str(np.float32(value))) if key.type == "f32" else value


def missing(table: GgufTable, config: Config, names: Iterator[str] | list[str] | tuple[str, ...]) -> list[str]:
    """GGUF names that a model of this config has and `names` lack; the runtime itself does not notice.

    A head that is tied is no tensor of its own.
    """
    there = set(names)
    family = architecture_for(table.part, str(config["model_type"]))
    wanted = []
    for canonical, expected in family.tensors(config).items():
        if expected.tied is None:
            wanted += table.disk_names(canonical)
    return [name for name in wanted if name not in there]
