"""Plans: where every tensor goes, known before a byte is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from llava_convert.core.errors import UsageError
from llava_convert.core.tensors import Extent, StoredTensor, nbytes_of
from llava_convert.core.text import to_json
from llava_convert.engine.plan import Plan, make_plan
from llava_convert.model.recipe import Recipe, joined_recipe
from llava_convert.model.target import KEEP, FileSet, Output, Target, parse_size
from llava_convert.ops.cast import Cast
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.rows import PadRows, RopePermute
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.safetensors import read_header

PAGE = 4096


def stored(name: str, shape: tuple[int, ...], *, dtype: str = "F16", path: str = "a", offset: int = 0) -> StoredTensor:
    return StoredTensor(name, dtype, shape, (Extent(Path(path), offset, nbytes_of(dtype, prod(shape))),))


def output(
    name: str, rows: int = 4, *, dtype: str = "F16", to: str = "F16", path: str = "a", offset: int = 0
) -> Output:
    return Output(name, f"x.{name}", Recipe(stored(name, (rows, 8), dtype=dtype, path=path, offset=offset)), to)


def plan_of(outputs: Sequence[Output], **settings: Any) -> Plan:
    return make_plan(Target("x", (FileSet(tuple(outputs), **settings),), {}))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        (" 5gb ", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("500 mib", 500 * 2**20),
        ("50KB", 50_000),
        ("1KiB", 1024),
        ("1.5GB", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("5B", 5),
        ("5", 5),
        ("9007199254740993", 9007199254740993),
        ("0.3GB", 300_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


BAD_SIZES = [
    "0",
    "-1",
    "",
    "GB",
    "NaN",
    "inf",
    "1e9",
    "5PB",
    "5 G B",
    "0.1B",
    "0GB",
    "keep",
    "5GB5",
    "1,5GB",
    "0x10",
    "5\0",
]


@pytest.mark.parametrize("text", BAD_SIZES)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.hint == "write 5GB, 500MiB or keep"


def test_a_size_larger_than_any_float() -> None:
    assert parse_size("9" * 400) > 10**399


# --- shards


def test_shards_fill_in_order_up_to_the_limit() -> None:
    """64 bytes a tensor and 150 a shard: two each. One of 256 bytes is larger than a shard and has its own."""
    outputs = [output(n, 16 if n == "d" else 4) for n in "abcdefg"]
    plan = plan_of(outputs, limit=150)
    assert [(shard.name, [t.name for t in shard.tensors]) for shard in plan.shards] == [
        ("model-00001-of-00005.safetensors", ["a", "b"]),
        ("model-00002-of-00005.safetensors", ["c"]),
        ("model-00003-of-00005.safetensors", ["d"]),
        ("model-00004-of-00005.safetensors", ["e", "f"]),
        ("model-00005-of-00005.safetensors", ["g"]),
    ]
    index = json.loads(plan.indexes["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": 6 * 64 + 256}
    assert index["weight_map"] == {t.name: shard.name for shard in plan.shards for t in shard.tensors}
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_exactly_the_limit_fits() -> None:
    assert len(plan_of([output("a"), output("b")], limit=128).shards) == 1
    assert len(plan_of([output("a"), output("b")], limit=127).shards) == 2


def test_the_limit_counts_the_output_dtype() -> None:
    outputs = [output(n, dtype="F16", to="F32") for n in "ab"]
    assert len(plan_of(outputs, limit=128).shards) == 2


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    plan = plan_of([output("a"), output("b")])
    assert [shard.name for shard in plan.shards] == ["model.safetensors"]
    assert plan.indexes == {}


def test_keep_follows_the_source() -> None:
    places = [("a", "2"), ("b", "1"), ("c", "2"), ("d", "3")]
    plan = plan_of([output(name, path=path, offset=8 * i) for i, (name, path) in enumerate(places)], limit=KEEP)
    assert [[t.name for t in shard.tensors] for shard in plan.shards] == [["a", "c"], ["b"], ["d"]]


def test_folders_have_shards_and_index_of_their_own() -> None:
    sets = (
        FileSet((output("a"), output("b")), limit=64),
        FileSet((output("a"),), folder="projector"),
        FileSet((output("c"), output("d")), folder="visual_encoder", limit=64),
    )
    plan = make_plan(Target("x", sets, {"config.json": b"{}"}))
    assert [shard.name for shard in plan.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "projector/model.safetensors",
        "visual_encoder/model-00001-of-00002.safetensors",
        "visual_encoder/model-00002-of-00002.safetensors",
    ]
    assert sorted(plan.indexes) == ["model.safetensors.index.json", "visual_encoder/model.safetensors.index.json"]
    inner = json.loads(plan.indexes["visual_encoder/model.safetensors.index.json"])
    assert inner["weight_map"]["c"] == "model-00001-of-00002.safetensors", "places are relative to the index"


def test_torch_container() -> None:
    (shard,) = plan_of([output("a")], stem="mm_projector", container="torch").shards
    assert (shard.name, shard.container) == ("mm_projector.bin", "torch")
    assert shard.header.startswith(b"PK") and len(shard.header) == shard.tensors[0].offset, "up to the first tensor"
    ((at, end),) = shard.pieces
    assert at == shard.tensors[0].offset + shard.tensors[0].nbytes and at + len(end) == shard.size
    assert shard.checks.keys() == {"a"}
    (other,) = plan_of([output("a")], container="torch", around={"meta": {"iter": 1}}, key="state_dict").shards
    assert other.name == "model.pth" and b"state_dict" in other.header


def test_against_safetensors(tmp_path: Path) -> None:
    """The real library opens a file of the planned header and size, and finds the planned tensors."""
    outputs = [output("a", 3), output("b", 5, to="F32"), output("c", 1, to="BF16"), output("long." * 200 + "name")]
    (shard,) = plan_of(outputs).shards
    file = tmp_path / shard.name
    file.write_bytes(shard.header + bytes(shard.size - len(shard.header)))
    names = {"F16": "F16", "F32": "F32", "BF16": "BF16"}
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        assert {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in found.items()} == {
            t.name: (names[t.dtype], t.shape) for t in shard.tensors
        }
    stored_again = read_header(file).tensors
    assert {t.name: t.offset for t in shard.tensors} == {n: s.extents[0].offset for n, s in stored_again.items()}


@pytest.mark.parametrize("offset", [0, 8, 680, PAGE - 8, PAGE, 123_456])
def test_copied_runs_lie_as_in_the_source(tmp_path: Path, offset: int) -> None:
    """Congruent modulo a page, so that a filesystem can share blocks; and the file is still valid."""
    sizes = [5, 700, 1]
    outputs, at = [], offset
    for i, rows in enumerate(sizes):
        outputs.append(output(f"t{i}", rows, offset=at))
        at += rows * 16
    (shard,) = plan_of(outputs).shards
    assert {(t.offset - t.source.extents[0].offset) % PAGE for t in shard.tensors} == {0}
    assert len(shard.header) % 8 == 0
    file = tmp_path / "x.safetensors"
    file.write_bytes(shard.header + bytes(shard.size - len(shard.header)))
    with safe_open(file, "np") as opened:
        assert sorted(opened.keys()) == ["t0", "t1", "t2"]


def test_most_bytes_decide_the_alignment() -> None:
    (shard,) = plan_of([output("a", 2, offset=8), output("b", 9, offset=200), output("c", 400, to="F32")]).shards
    offsets = {t.name: (t.offset - t.source.extents[0].offset) % PAGE for t in shard.tensors}
    assert offsets["b"] == 0 and offsets["a"] != 0


def test_an_unaligned_source_does_not_break_the_header() -> None:
    """Old torch files have odd offsets, at which no data can lie in a safetensors file: its header is padded to 8."""
    (shard,) = plan_of([output("a", 4, offset=13)]).shards
    assert len(shard.header) % 8 == 0


# --- gguf

GGUF_SHAPES = {
    "token_embd.weight": ("Q6_K", (40, 256)),
    "blk.0.attn_q.weight": ("Q4_K", (8, 512)),
    "blk.0.attn_norm.weight": ("F32", (33,)),
    "output.weight": ("BF16", (3, 31)),
}


def gguf_set(*, limit: int | str | None = None, **settings: Any) -> FileSet:
    outputs = [Output(n, f"x.{n}", Recipe(stored(n, shape, dtype="F32")), to) for n, (to, shape) in GGUF_SHAPES.items()]
    metadata = {
        "general.architecture": Typed("str", "llama"),
        "general.name": Typed("str", "Tiny"),
        "llama.block_count": Typed("u32", 1),
        "tokenizer.ggml.tokens": Typed("[str]", ("a", "b")),
    }
    return FileSet(tuple(outputs), stem="tiny-q4_k_m", limit=limit, container="gguf", metadata=metadata, **settings)


def by_gguf_py(folder: Path, *, limit: int = 0) -> dict[str, bytes]:
    """The same files by gguf-py's own writer, every weight a zero byte."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny-q4_k_m.gguf", "llama", split_max_size=limit)
    writer.add_name("Tiny")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    for name, (dtype, shape) in GGUF_SHAPES.items():
        kind = gguf.GGMLQuantizationType[dtype]
        raw = np.zeros((*shape[:-1], nbytes_of(dtype, shape[-1])), np.uint8)
        writer.add_tensor(name, raw.view(np.float32) if dtype == "F32" else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [0, 9000, 2000])
def test_against_gguf_py(tmp_path: Path, limit: int) -> None:
    """Whole files, one and split: names, metadata, tensor table, padding; the data are zeros in both."""
    plan = make_plan(Target("gguf", (gguf_set(limit=limit or None),), {}))
    wanted = by_gguf_py(tmp_path / "peer", limit=limit)
    assert len(wanted) == {0: 1, 9000: 2, 2000: 3}[limit]
    found = {shard.name: shard.header + bytes(shard.size - len(shard.header)) for shard in plan.shards}
    assert list(found) == sorted(wanted)
    assert found == wanted
    assert plan.indexes == {}
    for shard in plan.shards:
        (tmp_path / shard.name).write_bytes(found[shard.name])
        reader = gguf.GGUFReader(tmp_path / shard.name)
        assert {t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors} == {
            t.name: (t.dtype, t.offset, t.nbytes) for t in shard.tensors
        }


def test_gguf_is_one_file_unless_a_limit_is_given() -> None:
    for limit in (None, KEEP, 10**6):
        (shard,) = make_plan(Target("gguf", (gguf_set(limit=limit, folder="f"),), {})).shards
        assert (shard.name, shard.container) == ("f/tiny-q4_k_m.gguf", "gguf")
        assert [t.name for t in shard.tensors] == list(GGUF_SHAPES), "in the order given"
        assert all(t.shard == shard.name for t in shard.tensors)


def test_metadata_and_types_change_the_hash() -> None:
    one = gguf_set()
    other = replace(one, metadata={**one.metadata, "general.name": Typed("str", "Tinx")})
    third = replace(one, outputs=(replace(one.outputs[0], dtype="Q5_K"), *one.outputs[1:]))
    assert len({make_plan(Target("gguf", (files,), {})).hash for files in (one, other, third)}) == 3


# --- batches


def test_files_of_the_same_tensors_form_a_batch() -> None:
    """Two types of one model, one of them split; another model's in safetensors and in a torch file."""
    sets = (
        FileSet((output("a"), output("b")), folder="f16", limit=None),
        FileSet((output("p"),), folder="mmproj", limit=None),
        FileSet((output("a", to="F32"), output("b", to="F32")), folder="f32", limit=128),
        FileSet((output("p"),), stem="mm_projector", container="torch"),
    )
    plan = make_plan(Target("x", sets, {}))
    assert [[shard.name for shard in batch] for batch in plan.batches] == [
        [
            "f16/model.safetensors",
            "f32/model-00001-of-00002.safetensors",
            "f32/model-00002-of-00002.safetensors",
        ],
        ["mmproj/model.safetensors", "mm_projector.bin"],
    ]
    assert plan.bytes_read == 64 + 2 * 64, "each tensor once a batch"


def test_shards_of_one_type_stay_apart() -> None:
    plan = plan_of([output(n) for n in "abc"], limit=64)
    assert [len(batch) for batch in plan.batches] == [1, 1, 1]


# --- values


def test_ops_cast_only_what_differs() -> None:
    assert output("a").ops == ()
    assert output("a", to="F32").ops == (Cast("F32"),)
    padded = Output("a", "a", Recipe(stored("a", (4, 8))).then(PadRows(64)), "BF16")
    assert padded.ops == (PadRows(64), Cast("BF16"))
    (shard,) = plan_of([padded]).shards
    assert (shard.tensors[0].shape, shard.tensors[0].nbytes, shard.tensors[0].is_copy) == ((64, 8), 1024, False)


def test_bytes_of_a_plan() -> None:
    a, b = stored("a", (2, 8), dtype="F32"), stored("b", (4, 2), dtype="F32")
    merged = Output("m", "m", Recipe(stored("m", (4, 8))).then(MergeLora(a, b, 2.0)), "F16")
    plan = make_plan(Target("x", (FileSet((merged, output("c"))),), {"config.json": b"12345"}))
    assert plan.bytes_read == 64 + 64 + 32 + 64
    assert plan.bytes_written == plan.shards[0].size + 5
    assert plan.shards[0].size == len(plan.shards[0].header) + 128


def test_strided_tensors_are_no_copies() -> None:
    tensor = replace(stored("a", (4, 8)), strides=(1, 4))
    (shard,) = plan_of([Output("a", "a", Recipe(tensor), "F16")]).shards
    assert not shard.tensors[0].is_copy


# --- identity


def merged(scale: float = 2.0, *, dtype: str = "F32", offset: int = 0) -> Output:
    a, b = stored("a", (2, 8), dtype=dtype, path="l", offset=offset), stored("b", (4, 2), dtype="F32", path="l")
    return Output("m", "m", Recipe(stored("m", (4, 8))).then(MergeLora(a, b, scale)), "F16")


def target(
    outputs: Sequence[Output] = (), *, files: dict[str, bytes] | None = None, limit: int | str = KEEP, folder: str = ""
) -> Target:
    return Target("x", (FileSet((*outputs, output("z", 100)), folder, limit=limit),), files or {})


CHANGES: dict[str, Callable[[], Plan]] = {
    "nothing": lambda: make_plan(target([output("a")])),
    "a name": lambda: make_plan(target([output("b")])),
    "a dtype": lambda: make_plan(target([output("a", to="F32")])),
    "a dtype of the same size": lambda: make_plan(target([output("a", to="BF16")])),
    "rows": lambda: make_plan(target([output("a", 5)])),
    "an offset": lambda: make_plan(target([output("a", offset=PAGE)])),
    "a source file": lambda: make_plan(target([output("a", path="b")], limit=10**9)),
    "what the source's bytes mean": lambda: make_plan(target([output("a", dtype="BF16")])),
    "and with a cast": lambda: make_plan(target([output("a", dtype="F16", to="F32")])),
    "and with the same cast": lambda: make_plan(target([output("a", dtype="BF16", to="F32")])),
    "a limit": lambda: make_plan(target([output("a")], limit=64)),
    "a folder": lambda: make_plan(target([output("a")], folder="f")),
    "a file": lambda: make_plan(target([output("a")], files={"config.json": b"{}"})),
    "another file": lambda: make_plan(target([output("a")], files={"config.json": b"[]"})),
    "a file's name": lambda: make_plan(target([output("a")], files={"other.json": b"{}"})),
    "a tag": lambda: make_plan(target([output("a")]), tags={"digest": True}),
    "a merge": lambda: make_plan(target([merged()])),
    "its scale": lambda: make_plan(target([merged(3.0)])),
    "its operand": lambda: make_plan(target([merged(offset=8)])),
    "an order": lambda: make_plan(target([output("c", to="F32"), output("a")])),
}


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_where_the_bytes_of_a_member_go(dtype: str) -> None:
    """Against every byte of the joined tensor, marked by the member that it is of."""
    columns, groups, rows = 3, 4, (2, 1, 3)
    row = columns * nbytes_of(dtype, 1)
    marks = np.repeat(np.tile(np.repeat(np.arange(len(rows)), rows), groups), row)
    members = [
        Recipe(stored(f"m{n}", (groups * count, columns), dtype=dtype, path=f"m{n}")) for n, count in enumerate(rows)
    ]
    members[0] = members[0].then(RopePermute(2))  # copies alone would be joined where they lie
    (tensor,) = plan_of([Output("w", "w", joined_recipe(members, groups), dtype)]).tensors
    for number, piece in enumerate(tensor.pieces):
        assert (piece.source.name, piece.shape) == (f"m{number}", (groups * rows[number], columns))
        places = np.flatnonzero(marks == number)
        for start, length in ((0, len(places)), (1, 7), (row, 2 * row), (len(places) - 5, 5), (3, 0)):
            found = [np.arange(at, at + count) for at, count in piece.spans(start, length)]
            assert np.concatenate([[], *found]).tolist() == places[start : start + length].tolist()


def test_any_change_changes_the_hash() -> None:
    hashes = {what: make().hash for what, make in CHANGES.items()}
    same = {hash_: what for what, hash_ in hashes.items()}
    # "a dtype" and "and with a cast" are one plan, made twice: equal plans have equal hashes.
    assert hashes["a dtype"] == hashes["and with a cast"]
    assert len(same) == len(CHANGES) - 1
    assert {what: make().hash for what, make in CHANGES.items()} == hashes


def test_json_is_stable() -> None:
    assert to_json({"b": "é", "a": [1]}) == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'.encode()
