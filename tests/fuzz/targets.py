"""One fuzz target for each reader: how its input lies on disk, and the calls that a conversion makes of it.

What a reader takes is looked at too: a tensor it located must lie within its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava_convert.assets.tokenizer import files as tokenizer
from llava_convert.assets.tokenizer import llava_tokens as tokens
from llava_convert.core.tensors import StoredTensor
from llava_convert.layouts.training_config import parse_training_config
from llava_convert.model.configs import family, named_config, old_flavour
from llava_convert.model.tables.facts import fact_tables
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.types import check_types, key_types
from llava_convert.storage.gguf.file import encode_gguf, open_gguf
from llava_convert.storage.json_files import parse_json
from llava_convert.storage.pickle import machine
from llava_convert.storage.pyconfig.evaluate import evaluate
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.sentencepiece import read_pieces
from llava_convert.storage.sidecars import folder_sidecars
from llava_convert.storage.torch.file import read_torch, state_dict
from llava_convert.storage.weights import open_weights
from llava_convert.storage.zero.checkpoint import read_zero
from tests.fuzz import seeds

Read = Callable[[], None]
# Writes an input below a folder that holds nothing else, and gives what reads it.
Lay = Callable[[bytes, Path], Read]

# Our own tables, which are read once: no input has anything to do with that.
architectures(), fact_tables()


@dataclass(frozen=True)
class Target:
    """A reader under test. `words` are pieces of its format, for mutations; `limit` is that of an input's bytes."""

    lay: Lay
    seeds: Callable[[], seeds.Seeds]
    words: tuple[bytes, ...] = ()
    limit: int = 1 << 14


def _sound(tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        assert tensor.name == name, (tensor.name, name)
        held = 0
        for extent in tensor.extents:
            size = extent.path.stat().st_size
            assert 0 <= extent.offset <= extent.offset + extent.length <= size, (tensor, size)
            held += extent.length
        assert tensor.strides is not None or held == tensor.nbytes, tensor


def _file(folder: Path, name: str, data: bytes) -> Path:
    """Written over what is there: truncating a file to nothing first takes ext4 a millisecond."""
    path = folder / name
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        os.write(descriptor, data)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
    return path


def _safetensors(data: bytes, folder: Path) -> Read:
    path = _file(folder, "x.safetensors", data)
    return lambda: _sound(read_header(path).tensors)


def _gguf(data: bytes, folder: Path) -> Read:
    path = _file(folder, "x-00001-of-00002.gguf", data)
    _file(folder, "x-00002-of-00002.gguf", seeds.gguf_part(1))

    def read() -> None:
        found = open_gguf(path)
        _sound(found.tensors)
        assert found.shard_of.keys() == found.tensors.keys()
        encode_gguf(found.metadata, [])  # whatever was read can be written

    return read


def _weights(data: bytes, folder: Path) -> Read:
    if not (folder / "folder.safetensors").exists():
        (folder / "folder.safetensors").mkdir()
        for name, held in seeds.SHARDS.items():
            _file(folder, name, seeds.shard(held))
    _file(folder, "model.safetensors.index.json", data)

    def read() -> None:
        found = open_weights(folder)
        _sound(found.tensors)
        assert found.shard_of.keys() == found.tensors.keys()
        assert all(path.is_relative_to(folder) for path in found.files)

    return read


def _read_torch(path: Path) -> Read:
    return lambda: _sound(state_dict(read_torch(path)).tensors)


def _torch_zip(data: bytes, folder: Path) -> Read:
    return _read_torch(_file(folder, "x.pth", data if data.startswith(b"PK") else seeds.torch_zip(data)))


def _torch_legacy(data: bytes, folder: Path) -> Read:
    return _read_torch(_file(folder, "x.bin", data))


def _unpickle(data: bytes, folder: Path) -> Read:
    def read() -> None:
        loaded = machine.load(data, path=folder / "x.pkl", persistent=lambda pid: machine.Inert("storage"))
        assert 0 < loaded.end <= len(data)
        repr(loaded.root)  # shallow and free of cycles, but for what hides its contents

    return read


def _zero(data: bytes, folder: Path) -> Read:
    number, body = (data[0], data[1:]) if data else (0, data)
    pointed = number % 8 == 7
    root = folder / ("latest" if pointed else "three" if number & 8 else "two")
    holder = root / "save" if pointed else root
    holder.mkdir(parents=True, exist_ok=True)
    files = _zero_zips(3 if number & 8 and not pointed else 2)
    chosen = "" if pointed else list(files)[number % 8 % len(files)]
    for name, whole in files.items():
        _file(holder, name, seeds.torch_zip(body) if name == chosen else whole)
    if pointed:
        _file(root, "latest", body)
    return lambda: _sound(read_zero(root).tensors)


@cache
def _zero_zips(stage: int) -> dict[str, bytes]:
    return {name: seeds.torch_zip(pickled) for name, pickled in seeds.zero_files(stage).items()}


def _xtuner_config(data: bytes, folder: Path) -> Read:
    text = data.decode("utf-8", "surrogateescape")  # text of a pickle may hold half a surrogate pair
    base = seeds.CONFIG.decode()

    def read() -> None:
        evaluate(text, filename="c.py", load=lambda path: base if path.endswith("base.py") else None)
        parse_training_config(text, "c.py")

    return read


def _sentencepiece(data: bytes, folder: Path) -> Read:
    def read() -> None:
        assert all(isinstance(piece, str) for piece in read_pieces(data, folder / "tokenizer.model"))

    return read


def _tokenizer(data: bytes, folder: Path) -> Read:
    key_types(tokenizer.CONFIG)  # our own tables, which are read once
    for old in folder.iterdir():
        old.unlink()
    for part in data.split(seeds.PART) if data else ():
        _file(folder, tokenizer.FILES[(part or b"\0")[0] % len(tokenizer.FILES)], part[1:])

    def read() -> None:
        found = tokenizer.open_tokenizer(folder_sidecars(folder))
        plan = tokens.plan_llava_tokens(found, max(64, found.size if found.size < 1 << 20 else 64))
        made = tokens.with_tokens(found, plan, chat_template=None, processor_template="x")
        undo = tokens.undo_record(tokens.plain_files(found), plan, made)
        tokens.without_tokens(found, plan.added, undo)
        tokens.plain_files(found, "y")
        assert found.adds_bos in (True, False)
        assert {type(value) for value in (found.bos, found.eos, found.unk, found.pad)} <= {str, type(None)}

    return read


def _architecture(data: bytes, folder: Path) -> Read:

    def read() -> None:
        parsed = parse_json(data, "config.json")
        if isinstance(parsed, dict):
            check_types(parsed, "config.json", "config.json")
        config = old_flavour(parsed) if isinstance(parsed, dict) else {}
        kind = config.get("model_type")
        part = "vision_tower" if isinstance(kind, str) and "vision" in kind else "language_model"
        whole = named_config(config, part, where="config.json")
        expected = family(part, whole).tensors(whole)
        assert expected
        assert all(size >= 0 for want in expected.values() for size in want.shape)
        json.dumps(whole, indent=2)  # as every config is written again

    return read


_JSON = (
    b'{"',
    b'": ',
    b'":{',
    b"},",
    b"null",
    b"true",
    b"1e999",
    b"-1",
    b"[]",
    b"{}",
    b'""',
    b"\\ud800",
    b"9" * 20,
    b"NaN",
)
PICKLE_WORDS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nFloatStorage\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.storage\nUntypedStorage\n", b"ctorch\nSize\n", b"\x80\x02",
    b"ccollections\nOrderedDict\n)R", b"cbuiltins\ngetattr\n", b"cbuiltins\nset\n", b"X\x07\0\0\0storage", b"(lp0\n",
    b"cmmengine.logging\nHistoryBuffer\n", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x85", b"\x86", b"\x87", b"\x93",
    b"h\0", b"q\0", b"u.", b"tR", b"Q",
)  # fmt: skip
_GGUF = (
    b"GGUF\3\0\0\0", b"\x11\0\0\0\0\0\0\0general.alignment\4\0\0\0", b"\x0b\0\0\0\0\0\0\0split.count\2\0\0\0\2\0",
    b"\x09\0\0\0\x08\0\0\0\1\0\0\0\0\0\0\0", b"\x09\0\0\0\0\0\0\0", b"\1\0\0\0\0\0\0\0a",
    b"\0\0\0\1\0\0\0\0",
)  # fmt: skip
ZIP_WORDS = (
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"\x01\0\x10\0",
    b"\xff\xff\xff\xff",
)
PYTHON_WORDS = (
    b"model = ", b"dict(", b"[x for x in ", b"range(9)", b"lambda: 0", b"f'{x!r:>9}'", b"**", b" << ", b"_base_ = ",
    b"'a' * 99999", b"del ", b"model['llm']", b"a, *b = ", b"if x:\n    ", b"for x in [1, 2]:\n    ", b"while x:\n    ",
    b"def f(x):\n    ", b"class A:\n    ", b"try:\n    ", b"with read_base():\n    from .base import *\n", b".append(",
    b".format(", b"' % ", b"sorted(", b"copy.deepcopy(", b"import copy\n", b" in ", b" is ", b":=", b"dict(zip(",
    b"(yield)", b"await x", b"LoraConfig(", b"1e999", b"-1", b"[::-1]", b".update(", b"global x\n", b"1j",
    b"__import__", b"{{_base_.x}}", b"{1: ", b"...",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "safetensors": Target(_safetensors, seeds.safetensors_seeds, (*_JSON, b'"dtype"', b'"shape"', b'"data_offsets"')),
    "gguf": Target(_gguf, seeds.gguf_seeds, _GGUF),
    "weights": Target(_weights, seeds.index_seeds, (*_JSON, b'"weight_map"', b".safetensors", b"../", b".bin", b"/")),
    "torch_zip": Target(_torch_zip, seeds.torch_zip_seeds, PICKLE_WORDS + ZIP_WORDS),
    "torch_legacy": Target(_torch_legacy, seeds.legacy_seeds, PICKLE_WORDS),
    "unpickle": Target(_unpickle, seeds.unpickle_seeds, PICKLE_WORDS, 1 << 16),
    "zero": Target(_zero, seeds.zero_seeds, (*PICKLE_WORDS, b"param_shapes", b"fp32_flat_groups", b"partition_count")),
    "xtuner_config": Target(_xtuner_config, seeds.config_seeds, PYTHON_WORDS),
    "sentencepiece": Target(_sentencepiece, seeds.sentencepiece_seeds),
    "tokenizer": Target(
        _tokenizer, seeds.tokenizer_seeds, (*_JSON, b'"content"', b'"added_tokens"', b'"vocab"', b'"id"')
    ),
    "architecture": Target(
        _architecture, seeds.architecture_seeds, (*_JSON, b'"num_hidden_layers"', b'"head_dim"', b'"llama"')
    ),
}
