"""Tensors joined by rows and parted again, against NumPy: where bytes lie, what is written, and what cancels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.tensors import Extent, StoredTensor, nbytes_of
from llava_convert.engine.compare import compare
from llava_convert.engine.execute import execute
from llava_convert.engine.plan import make_plan
from llava_convert.engine.tasks import Copy, tasks_of
from llava_convert.model.recipe import Recipe, joined_recipe
from llava_convert.model.target import FileSet, Output, Target
from llava_convert.ops.base import Op
from llava_convert.ops.cast import Cast
from llava_convert.ops.join import Join, Part, joined, parts, shares
from llava_convert.ops.lora import MergeLora
from llava_convert.ops.quantize import Dequantize, Quantize
from llava_convert.ops.rows import PadRows, RopePermute, TakeRows
from llava_convert.storage.output.staging import Staging
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.safetensors import read_header

HEADS, KV_HEADS, SIZE, COLUMNS = 6, 2, 4, 32
made = np.random.default_rng(3)


def floats(rows: int, columns: int = COLUMNS) -> np.ndarray:
    return made.standard_normal((rows, columns), np.float32)


Q, K, V = floats(HEADS * SIZE), floats(KV_HEADS * SIZE), floats(KV_HEADS * SIZE)
GROUPED = np.concatenate(
    [rows for g in range(KV_HEADS) for rows in (Q[g * 12 : g * 12 + 12], K[g * 4 : g * 4 + 4], V[g * 4 : g * 4 + 4])]
)
"""InternLM2's wqkv, by hand: for each head of keys its three heads of queries, then keys and values."""
FUSED = np.concatenate([Q, K, V])
"""Phi-3's qkv_proj, by hand."""


def stored(folder: Path, name: str, values: np.ndarray) -> StoredTensor:
    """A tensor in a file of its own, not at its start."""
    path = folder / name
    path.write_bytes(b"x" * 24 + values.tobytes())
    return StoredTensor(name, "F32", values.shape, (Extent(path, 24, values.nbytes),))


def _staging(out: Path, stamp: str) -> Staging:
    return Staging(out, stamp, force=False, resume=False, needed_bytes=0, say=lambda text: None)


def written(folder: Path, recipe: Recipe, dtype: str = "F32", *, digest: bool = False, threads: int = 2) -> np.ndarray:
    """What the executor makes of a recipe, read back; its bytes are compared with a recomputation, too."""
    plan = make_plan(Target("x", (FileSet((Output("w", "w", recipe, dtype), Output("v", "v", recipe, dtype))),), {}))
    out = folder / f"out{len(list(folder.iterdir()))}"
    with FilePool() as pool, _staging(out, plan.hash) as stage:
        outcome = execute(plan, stage, pool, threads=threads, digest=digest, progress=lambda done: None)
        stage.commit()
    header = read_header(out / "model.safetensors")
    raw = (out / "model.safetensors").read_bytes()
    with FilePool() as pool:
        sink = compare(plan.tensors, header.tensors, pool, progress=lambda done: None)
    assert sink.differences == {}, "a full check recomputes the same bytes"
    extents = [header.tensors[name].extents[0] for name in ("w", "v")]
    one, other = (raw[extent.offset : extent.offset + extent.length] for extent in extents)
    assert one == other
    if digest:
        assert set(outcome.digests.values()) == {xxhash.xxh3_128(one).hexdigest()}
    types = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
    return np.frombuffer(one, types[dtype]).reshape(recipe.shape)


def recipes(folder: Path, *ops: tuple[Op, ...]) -> list[Recipe]:
    given: Sequence[tuple[Op, ...]] = ops or ((), (), ())
    sources = zip("qkv", (Q, K, V), given, strict=True)
    return [Recipe(stored(folder, name, values), done) for name, values, done in sources]


@pytest.mark.parametrize(("groups", "whole"), [(KV_HEADS, GROUPED), (1, FUSED)], ids=["grouped", "one after another"])
def test_a_join_of_copies_is_a_copy_of_spans(tmp_path: Path, groups: int, whole: np.ndarray) -> None:
    recipe = joined_recipe(recipes(tmp_path), groups)
    assert recipe.ops == () and recipe.shape == whole.shape
    plan = make_plan(Target("x", (FileSet((Output("w", "w", recipe, "F32"),)),), {}))
    assert all(isinstance(task, Copy) for task in tasks_of(plan.tensors)), "no row is looked at"
    assert (written(tmp_path, recipe) == whole).all()
    assert (written(tmp_path, recipe, digest=True) == whole).all()


@pytest.mark.parametrize(("groups", "whole"), [(KV_HEADS, GROUPED), (1, FUSED)], ids=["grouped", "one after another"])
def test_parts_of_a_whole_are_its_members(tmp_path: Path, groups: int, whole: np.ndarray) -> None:
    recipe = Recipe(stored(tmp_path, "w", whole))
    rows = shares(len(whole), groups, (HEADS, KV_HEADS, KV_HEADS))
    found = [recipe.part(part) for part in parts(groups, rows)]
    assert [one.ops for one in found] == [(), (), ()]
    for one, wanted in zip(found, (Q, K, V), strict=True):
        assert (written(tmp_path, one) == wanted).all()
    assert joined_recipe(found, groups) == recipe, "a join of all parts is the whole, in one span"


def test_parts_of_a_join_are_its_members(tmp_path: Path) -> None:
    members = recipes(tmp_path, (RopePermute(HEADS),), (RopePermute(KV_HEADS),), ())
    whole = joined_recipe(members, KV_HEADS)
    join = whole.ops[-1]
    assert isinstance(join, Join)
    assert [whole.part(part) for part in join.parts] == members
    with pytest.raises(UnsupportedError, match="can only be split in the same way"):
        whole.part(Part(1, 0, 20, 40))


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("groups", [KV_HEADS, 1])
def test_members_with_ops_of_their_own(tmp_path: Path, groups: int, digest: bool) -> None:
    def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
        return rows.reshape(heads, 2, -1, COLUMNS).swapaxes(1, 2).reshape(rows.shape)

    q, k = pairs(Q, HEADS), pairs(K, KV_HEADS)
    wanted = np.concatenate([one.reshape(groups, -1, COLUMNS)[g] for g in range(groups) for one in (q, k, V)])
    recipe = joined_recipe(recipes(tmp_path, (RopePermute(HEADS),), (RopePermute(KV_HEADS),), ()), groups)
    assert [op.name for op in recipe.ops] == ["rope_permute", "join"]
    assert (written(tmp_path, recipe, digest=digest) == wanted).all()
    half = recipe.then(Cast("F16"))
    assert [one.ops[-1] for one in half.members] == [Cast("F16")] * 3, "each member is cast on its way"
    assert (written(tmp_path, recipe, "F16", digest=digest) == wanted.astype(np.float16)).all()


def test_one_thread_writes_the_same_bytes_as_four(tmp_path: Path) -> None:
    recipe = joined_recipe(recipes(tmp_path, (RopePermute(HEADS),), (), ()), KV_HEADS)
    assert (written(tmp_path, recipe, threads=1) == written(tmp_path, recipe, threads=4)).all()


def test_a_lora_on_the_whole_is_split_by_the_rows_of_b(tmp_path: Path) -> None:
    a, b = floats(3), floats(len(GROUPED), 3)
    op = MergeLora(stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.5)
    whole = Recipe(stored(tmp_path, "w", GROUPED), (op,))
    wanted = written(tmp_path, whole)
    assert np.allclose(wanted, GROUPED + 0.5 * (b @ a), atol=1e-5)
    rows = shares(len(GROUPED), KV_HEADS, (HEADS, KV_HEADS, KV_HEADS))
    found = [whole.part(part) for part in parts(KV_HEADS, rows)]
    for one, part in zip(found, parts(KV_HEADS, rows), strict=True):
        (merge,) = one.ops
        assert isinstance(merge, MergeLora) and merge.a == op.a and merge.b.shape == (one.shape[0], 3)
        inside = np.arange(len(GROUPED)) % part.of
        mine = (inside >= part.start) & (inside < part.start + part.rows)
        assert (written(tmp_path, one) == wanted[mine]).all()


def test_a_lora_on_a_join_goes_to_each_member(tmp_path: Path) -> None:
    op = MergeLora(stored(tmp_path, "a", floats(3)), stored(tmp_path, "b", floats(len(GROUPED), 3)), 0.5)
    on_whole = written(tmp_path, Recipe(stored(tmp_path, "w", GROUPED), (op,)))
    rope = [(RopePermute(HEADS),), (RopePermute(KV_HEADS),), ()]
    back = [(*ops, *(RopePermute(one.heads, back=True) for one in ops)) for ops in rope]
    recipe = joined_recipe(recipes(tmp_path, *back), KV_HEADS).then(op)
    assert [len(one.ops) for one in recipe.members] == [3, 3, 1]
    assert (written(tmp_path, recipe) == on_whole).all()


def test_three_loras_on_the_parts_of_one_whole(tmp_path: Path) -> None:
    """Each part merges its own, and the join is of what comes out."""
    ops = []
    for name, values in (("q", Q), ("k", K), ("v", V)):
        a, b = stored(tmp_path, f"a{name}", floats(2)), stored(tmp_path, f"b{name}", floats(len(values), 2))
        ops.append((MergeLora(a, b, 2.0),))
    apart = [written(tmp_path, one) for one in recipes(tmp_path, *ops)]
    whole = written(tmp_path, joined_recipe(recipes(tmp_path, *ops), KV_HEADS))
    assert (whole == np.concatenate([one.reshape(KV_HEADS, -1, COLUMNS)[g] for g in (0, 1) for one in apart])).all()


def test_a_part_of_what_lies_column_by_column(tmp_path: Path) -> None:
    tensor = stored(tmp_path, "t", np.ascontiguousarray(GROUPED.T))
    turned = StoredTensor("t", "F32", GROUPED.shape, tensor.extents, (1, len(GROUPED)))
    rows = shares(len(GROUPED), KV_HEADS, (HEADS, KV_HEADS, KV_HEADS))
    one = Recipe(turned).part(parts(KV_HEADS, rows)[1])
    assert [op.name for op in one.ops] == ["part"]
    assert (written(tmp_path, one) == K).all()


def test_quantised_members_are_of_one_type(tmp_path: Path) -> None:
    def blocks(name: str, dtype: str) -> Recipe:
        (tmp_path / name).write_bytes(bytes(nbytes_of(dtype, 4 * 256)))
        return Recipe(StoredTensor(name, dtype, (4, 256), (Extent(tmp_path / name, 0, nbytes_of(dtype, 4 * 256)),)))

    same = joined_recipe([blocks("a", "Q8_0"), blocks("b", "Q8_0")], 2)
    assert (same.dtype, same.shape, len(same.tensor.extents)) == ("Q8_0", (8, 256), 4)
    with pytest.raises(UnsupportedError, match="different types: Q4_K, Q6_K") as caught:
        joined_recipe([blocks("a", "Q4_K"), blocks("b", "Q6_K")], 2)
    assert "--dequantize" in str(caught.value.hint)
    both = joined_recipe([blocks("a", "Q4_K").then(Dequantize()), blocks("b", "Q6_K").then(Dequantize())], 2)
    assert both.dtype == "F32"


def test_floats_of_several_types_are_widened_and_come_back_unchanged(tmp_path: Path) -> None:
    half = StoredTensor("h", "F16", (8, 4), (Extent(tmp_path / "h", 0, 64),))
    wide = StoredTensor("w", "F32", (8, 4), (Extent(tmp_path / "w", 0, 128),))
    recipe = joined_recipe([Recipe(half), Recipe(wide)], 1)
    assert recipe.dtype == "F32"
    assert [one.ops for one in recipe.then(Cast("F16")).members] == [(), (Cast("F16"),)]


@pytest.mark.parametrize("op", [PadRows(80), TakeRows(8), RopePermute(2)])
def test_rows_of_a_join_stay_where_they_are(tmp_path: Path, op: Op) -> None:
    with pytest.raises(UnsupportedError, match=op.name):
        joined_recipe(recipes(tmp_path, (RopePermute(HEADS),), (), ()), 1).then(op)


def test_rows_that_are_no_whole_groups() -> None:
    with pytest.raises(UnsupportedError, match="40 rows are not 3 groups") as caught:
        shares(40, 3, (3, 1, 1))
    assert "head counts" in str(caught.value.hint)
    for groups, weights in ((0, (1, 1)), (2, (0, 0)), (40, (1, 1))):
        with pytest.raises(UnsupportedError, match="are not"):
            shares(40, groups, weights)
    with pytest.raises(UnsupportedError, match="not 3 groups of 10"):
        Part(3, 0, 5, 10).result("F32", (40, 2))


def test_spans_over_many_extents() -> None:
    """A tensor in pieces, as ZeRO leaves one: parts are cut out of the pieces and run together where they can."""
    pieces = tuple(Extent(Path(name), 100, 64) for name in "abc")
    tensor = StoredTensor("w", "F32", (12, 4), pieces)
    first, second = (part.stored(tensor) for part in parts(2, (2, 4)))
    assert first is not None and second is not None
    assert first.extents == (Extent(Path("a"), 100, 32), Extent(Path("b"), 132, 32))
    assert second.extents == (Extent(Path("a"), 132, 32), Extent(Path("b"), 100, 32), Extent(Path("c"), 100, 64))
    whole = joined([first, second], 2)
    assert whole is not None and (whole.extents, whole.shape) == (pieces, (12, 4))


def test_several_types_of_one_join(tmp_path: Path) -> None:
    """Files of one model in several types are written together, and each member is read once for all of them."""
    whole = joined_recipe(recipes(tmp_path, (RopePermute(HEADS),), (RopePermute(KV_HEADS),), ()), KV_HEADS)
    sets = tuple(FileSet((Output("w", "w", whole, kind),), stem=kind, container="gguf") for kind in ("F32", "Q8_0"))
    plan = make_plan(Target("x", sets, {}))
    work = [task for task in tasks_of(plan.tensors) if not isinstance(task, Copy)]
    assert sorted(len(task.tensors) for task in work) == [2, 2, 2]
    assert {op for t in plan.tensors for piece in t.pieces for op in piece.ops} >= {Quantize("Q8_0")}
