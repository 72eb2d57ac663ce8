"""GGUF files as a source: a language model, and the mmproj with tower and projector, of llama.cpp.

Names and the order of rows are put back as transformers has them; what lies beside the weights elsewhere is made of the
metadata. Quantised weights keep their bytes, unless they may be dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import QUANTS, StoredTensor
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.layouts.base import Found, OpenOptions
from llava_convert.layouts.gguf import defects, mmproj, stock
from llava_convert.layouts.gguf.files import (
    ARCHITECTURE,
    SUFFIX,
    VISION_ARCHITECTURE,
    Files,
    find,
    find_all,
    starts_as_gguf,
)
from llava_convert.layouts.gguf.mixes import OUTTYPES
from llava_convert.layouts.gguf.mmproj import value
from llava_convert.layouts.gguf.names import GgufTable, config_of, table_for_arch, table_for_family
from llava_convert.layouts.gguf.ollama import is_manifest
from llava_convert.layouts.gguf.rope import LLAMA3_TENSOR
from llava_convert.model.checkpoint import (
    IMAGE_NEWLINE,
    LLM,
    PARTS,
    PROJECTOR,
    VISION,
    Checkpoint,
    Dropped,
    Part,
    Parts,
    Settings,
)
from llava_convert.model.configs import family, named_config
from llava_convert.model.facts import LAYER, STRATEGY, read_facts
from llava_convert.model.options import ALL
from llava_convert.model.record import read_record
from llava_convert.model.tables.names import lookup_errors
from llava_convert.ops.base import Op
from llava_convert.ops.quantize import Dequantize
from llava_convert.storage.gguf.file import Gguf
from llava_convert.storage.headers import Headers
from llava_convert.storage.sidecars import Sidecars, made_sidecars

NAME = "gguf"


def detect(found: Found) -> str | None:
    """A folder is GGUF's where its files are and no config.json makes it a folder of transformers'."""
    if found.path.is_dir():
        files = [name for name in found.names if name.lower().endswith(SUFFIX)]
        return f"it holds GGUF files ({len(files)})" if files and found.config is None else None
    if found.path.suffix.lower() == SUFFIX or starts_as_gguf(found.path, found.headers):
        return "it is a GGUF file"
    return "it is a manifest of Ollama's store" if is_manifest(found.path, found.headers) else None


def open(found: Found, options: OpenOptions) -> Checkpoint:
    """Open a file, or a folder with one model.

    Raises UnsupportedError (exit 4) where which files count is not clear, for architectures and projectors that are not
    known and for tensors that these do not have; InputError for what is corrupt; what reading a header raises.
    """
    return _opened(found, find(found.path, found.headers, options.mmproj), options)


def made_with(theirs: Checkpoint) -> dict[str, str]:
    """The options that a file itself tells, for a comparison with what a conversion would write."""
    told = mmproj.value(theirs.stated.get(VISION, {}), stock.KEY)
    return {"mmproj_for": str(told)} if told is not None else {}


def open_each(found: Found, options: OpenOptions) -> list[Checkpoint]:
    """Every file of a folder with several types of one model, for a comparison of each."""
    path = found.path
    return [
        _opened(replace(found, path=files.path) if path.is_dir() else found, files, options)
        for files in find_all(path, found.headers)
    ]


@dataclass
class _Opened:
    """What is gathered of the files of one model."""

    headers: Headers
    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    settings: Settings = field(default_factory=Settings)
    newline: StoredTensor | None = None
    ggufs: list[Gguf] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, mmproj.Metadata] = field(default_factory=dict)


def _opened(source: Found, files: Files, options: OpenOptions) -> Checkpoint:
    found = _Opened(source.headers)
    recorded = read_record(source.beside)
    record = recorded if recorded is not None and recorded.get("layout", {}).get("to") == NAME else None
    if files.llm is not None:
        _open_llm(found, files.llm, options)
    if files.mmproj is not None:
        _open_mmproj(found, files.mmproj, options, Settings.recorded(record))
    if files.mmproj is None:
        found.notes.append("there is no mmproj beside it: a language model alone, which `--part all` then means")
    elif files.llm is None:
        found.notes.append("it is an mmproj: vision tower and projector without a language model")
    else:
        found.notes.append(f"vision tower and projector are from {files.mmproj.name}")
    return Checkpoint(
        layout=NAME,
        path=source.path,
        root=files.path.parent,
        files=tuple(file for gguf in found.ggufs for file in gguf.files),
        beside=source.beside,
        parts=found.parts,
        settings=found.settings,
        image_newline=found.newline,
        dropped=tuple(found.dropped),
        notes=tuple(found.notes),
        warnings=tuple(found.warnings),
        default_part=LLM if files.mmproj is None else ALL,
        whole=files.llm is not None and files.mmproj is not None,
        defects=tuple(found.defects),
        facts=found.facts,
        stated=found.stated,
    )


def _open_llm(found: _Opened, path: Path, options: OpenOptions) -> None:
    gguf = found.headers.gguf(path)
    found.ggufs.append(gguf)
    table = table_for_arch(_architecture(gguf, path))
    config, told = _llm_config(table, gguf, path, found)
    weights, ops, joins = _named(found, gguf.tensors, [table], config, path, options)
    name = value(gguf.metadata, "general.name")
    if isinstance(name, str) and name:
        config.setdefault("_name_or_path", name)
    files = llm_sidecars(gguf.metadata, path)
    found.parts[LLM] = Part(weights, config=config if told else None, files=files, ops=ops, joins=joins)
    found.defects += defects.llm_defects(gguf.metadata)
    found.facts |= _facts(gguf.metadata, config)
    found.stated[LLM] = gguf.metadata
    plain = {key: typed.value for key, typed in gguf.metadata.items()}
    found.settings = Settings.of(read_facts(NAME, plain, str(path)))


def _llm_config(table: GgufTable, gguf: Gguf, path: Path, found: _Opened) -> tuple[dict[str, Any], bool]:
    """The language model's config, and whether it is all told: a rope scaling may be one that only --llm can tell."""
    try:
        config, told = config_of(table, gguf.metadata, gguf.tensors), True
    except UnsupportedError as problem:
        if LLAMA3_TENSOR not in gguf.tensors:
            raise
        rest = {name: tensor for name, tensor in gguf.tensors.items() if name != LLAMA3_TENSOR}
        config, told = config_of(table, gguf.metadata, rest), False
        found.warnings.append(f"{problem.message}: the config of the original language model is needed (--llm)")
    return named_config(config, LLM, where=str(path)), told


def _open_mmproj(found: _Opened, path: Path, options: OpenOptions, recorded: Settings) -> None:
    gguf = found.headers.gguf(path)
    found.ggufs.append(gguf)
    mmproj.require_llava(gguf.metadata, path)
    tower, projector = table_for_arch(VISION_ARCHITECTURE), table_for_family("projector")
    config = named_config(config_of(tower, gguf.metadata, gguf.tensors), VISION, where=str(path))
    config = mmproj.completed(config)
    tensors = mmproj.with_legacy_names(gguf.tensors, int(config["hidden_size"]))
    weights, ops, _ = _named(found, tensors, [tower, projector], config, path, options)
    joins: dict[str, Parts] = {}
    if mmproj.value(gguf.metadata, stock.KEY) is not None:
        stock.taken_apart(weights, joins)
        found.facts["mmproj for"] = "the stock llama.cpp, which puts the class token last"
    found.newline = weights.pop(IMAGE_NEWLINE, None)
    by_part = {part: {n: t for n, t in weights.items() if n.startswith(f"{part}.")} for part in (VISION, PROJECTOR)}
    found.parts[VISION] = Part(
        by_part[VISION],
        config=config,
        files=mmproj.processor_sidecars(gguf.metadata, config, path),
        ops=ops,
        synthetic=mmproj.synthetic(config),
        joins=joins,
    )
    found.parts[PROJECTOR] = Part(by_part[PROJECTOR], ops=ops)
    layer, note = mmproj.feature_layer(gguf.metadata, config, path)
    found.settings = Settings.of(
        {
            **recorded.facts,
            **found.settings.said,
            LAYER: layer,
            STRATEGY: "default" if family(VISION, config).class_token else "full",
            **mmproj.next_facts(gguf.metadata),
        }
    )
    found.notes += [note] if note else []
    found.defects += defects.vision_defects(gguf.metadata, tower, config, tensors)
    found.stated[VISION] = gguf.metadata
    found.facts["mmproj blocks"] = config["num_hidden_layers"]


def _architecture(gguf: Gguf, path: Path) -> str:
    found = value(gguf.metadata, ARCHITECTURE)
    kind = value(gguf.metadata, "general.type", "model")
    if not isinstance(found, str) or kind != "model":
        what = f"of the type {printable(kind)}" if kind != "model" else f"without {ARCHITECTURE}"
        raise UnsupportedError(f"{printable(path)}: it is a GGUF {what}, not a language model")
    return found


def _named(
    found: _Opened,
    tensors: Mapping[str, StoredTensor],
    tables: list[GgufTable],
    config: Mapping[str, Any],
    path: Path,
    options: OpenOptions,
) -> tuple[dict[str, StoredTensor], dict[str, tuple[Op, ...]], dict[str, Parts]]:
    """Tensors by canonical name, the ops which make each of what is stored, and those that lie in parts.

    Raises UnsupportedError (exit 4) for names that no table has and for tensors that change what the model computes,
    InputError where two mean the same tensor, and where one of several parts is missing.
    """
    weights: dict[str, StoredTensor] = {}
    ops: dict[str, tuple[Op, ...]] = {}
    joins: dict[str, Parts] = {}
    unknown: dict[str, str] = {}
    for disk, stored in tensors.items():
        reason = next((said for table in tables if (said := table.dropped(disk)) is not None), None)
        if reason is not None:
            found.dropped.append(Dropped(disk, reason))
            continue
        meant = [(table, one) for table in tables for one in table.read(disk, stored.shape, config)]
        if not meant:
            unknown[disk] = disk
        for table, one in meant:
            if (reason := table.omits(one.name)) is not None:
                raise UnsupportedError(f"{printable(path)}: it holds {printable(disk)}: {reason}")
            if one.name in weights:
                raise InputError(
                    f"{printable(path)}: two tensors stand for {one.name}, and {printable(disk)} is one of them"
                )
            tensor = stored if one.take is None else one.take.stored(stored)
            assert tensor is not None  # a GGUF's tensors lie row by row
            weights[one.name] = tensor
            if one.whole:
                joins[one.whole] = Parts(one.others, one.groups)
            if made := (*one.ops, *([Dequantize()] if options.dequantize and tensor.dtype in QUANTS else ())):
                ops[one.name] = made
    if unknown:
        raise UnsupportedError(f"{printable(path)}: {lookup_errors(unknown, tables[0].names, _known(tables, config))}")
    for whole, parts in joins.items():
        lacking = [i for i, name in enumerate(parts.names) if name not in weights]
        if lacking:
            disks = next(names for table in tables if (names := table.disk_names(whole)))
            raise InputError(
                f"{printable(path)}: it lacks {disks[lacking[0]]}, one of the {len(disks)} parts of {whole}",
                hint="it is incomplete; get it again",
            )
    return weights, ops, joins


def _known(tables: list[GgufTable], config: Mapping[str, Any]) -> list[str]:
    """The names that a file of this config has."""
    part = tables[0].part
    return [disk for name in family(part, config).tensors(config) for disk in tables[0].disk_names(name)]


def _facts(metadata: mmproj.Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `inspect` tells of a language model, by what users look for."""
    tokens = value(metadata, "tokenizer.ggml.tokens", ())
    kind, pre = value(metadata, "tokenizer.ggml.model"), value(metadata, "tokenizer.ggml.pre")
    return {
        "name": value(metadata, "general.name", "not told"),
        "architecture": value(metadata, ARCHITECTURE),
        "file type": _file_type(value(metadata, "general.file_type")),
        "tokenizer": f"{kind}, {pre or 'no pre-tokenizer named'}, {len(tokens)} tokens" if tokens else "none",
        "chat template": "yes" if value(metadata, "tokenizer.chat_template") else "no",
        "context length": config.get("max_position_embeddings"),
        "blocks": config["num_hidden_layers"],
    }


def _file_type(number: Any) -> str:
    names = {outtype.file_type: name for name, outtype in OUTTYPES.items()}
    return names.get(number, "not told" if number is None else f"number {number}")


def llm_sidecars(metadata: mmproj.Metadata, where: Path) -> Sidecars:
    """The tokenizer's files, made of the metadata when one of them is asked for."""

    def make() -> Mapping[str, bytes]:
        if not value(metadata, "tokenizer.ggml.tokens"):
            return {}
        from llava_convert.layouts.gguf.rebuilt import tokenizer_files  # a look at the weights needs none of it

        return tokenizer_files(metadata)

    return made_sidecars(where, make)
