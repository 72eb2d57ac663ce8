"""Shards, headers and sizes of random plans."""

from __future__ import annotations

import json
import string
import tempfile
from itertools import pairwise
from math import prod
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from llava_convert.core.tensors import DTYPE_BITS, Extent, StoredTensor
from llava_convert.engine.plan import Plan, make_plan
from llava_convert.model.recipe import Recipe
from llava_convert.model.target import KEEP, FileSet, Output, Target, parse_size, size_of
from llava_convert.ops.rows import PadRows

names = st.text(string.ascii_lowercase + "._0", min_size=1, max_size=8).filter(lambda n: ".." not in n)
dtypes = st.sampled_from(["F16", "BF16", "F32"])


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    dtype, to = draw(dtypes), draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    path, offset = Path(draw(st.sampled_from("abc"))), draw(st.integers(0, 10_000))
    extent = Extent(path, offset, prod(shape) * DTYPE_BITS[dtype] // 8)
    recipe = Recipe(StoredTensor("x", dtype, shape, (extent,)))
    if draw(st.booleans()):
        recipe = recipe.then(PadRows(shape[0] + draw(st.integers(0, 9))))
    return Output("", "", recipe, to)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Output], int | str, Plan]:
    chosen = draw(st.lists(names, min_size=1, max_size=12, unique=True))
    made = [draw(outputs()) for _ in chosen]
    found = [Output(name, name, one.recipe, one.dtype) for name, one in zip(chosen, made, strict=True)]
    limit: int | str = draw(st.one_of(st.just(KEEP), st.integers(1, 5000)))
    return found, limit, make_plan(Target("x", (FileSet(tuple(found), limit=limit),), {}))


@given(plans())
def test_every_tensor_is_there_once_as_asked(case: tuple[list[Output], int | str, Plan]) -> None:
    wanted, _, plan = case
    assert sorted(t.name for t in plan.tensors) == sorted(o.name for o in wanted)
    by_name = {t.name: t for t in plan.tensors}
    for one in wanted:
        planned = by_name[one.name]
        assert (planned.dtype, planned.shape, planned.nbytes) == (one.dtype, one.recipe.shape, size_of(one))
        assert planned.ops == one.ops


@given(plans())
def test_limit_and_order(case: tuple[list[Output], int | str, Plan]) -> None:
    wanted, limit, plan = case
    order = {one.name: i for i, one in enumerate(wanted)}
    spans = [sorted(order[t.name] for t in shard.tensors) for shard in plan.shards]
    assert all(spans)
    if limit == KEEP:
        for shard in plan.shards:
            assert len({t.source.extents[0].path for t in shard.tensors}) == 1
        assert spans == sorted(spans)
        return
    # The module order, cut: each shard takes up where the last one ended, and none could have taken one more.
    assert [i for span in spans for i in span] == list(range(len(wanted)))
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        size = sum(size_of(wanted[i]) for i in span)
        assert size <= int(limit) or len(span) == 1
        if following is not None:
            assert size + size_of(wanted[following[0]]) > int(limit)


@given(plans())
def test_index_is_right(case: tuple[list[Output], int | str, Plan]) -> None:
    wanted, _, plan = case
    if len(plan.shards) == 1:
        assert not plan.indexes and plan.shards[0].name == "model.safetensors"
        return
    index = json.loads(plan.indexes["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(map(size_of, wanted))
    assert index["weight_map"] == {t.name: shard.name for shard in plan.shards for t in shard.tensors}
    count = len(plan.shards)
    assert [s.name for s in plan.shards] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@given(plans())
def test_files_are_whole_and_the_real_library_opens_them(case: tuple[list[Output], int | str, Plan]) -> None:
    *_, plan = case
    for shard in plan.shards:
        spans = sorted((t.offset, t.offset + t.nbytes) for t in shard.tensors)
        assert spans[0][0] == len(shard.header)
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] == shard.size
        assert all(t.offset * 8 % DTYPE_BITS[t.dtype] == 0 for t in shard.tensors)
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(shard.header + bytes(shard.size - len(shard.header)))
            file.flush()
            with safe_open(file.name, "pt") as opened:
                assert sorted(opened.keys()) == sorted(t.name for t in shard.tensors)


@given(plans())
def test_hash_depends_on_the_plan_alone(case: tuple[list[Output], int | str, Plan]) -> None:
    wanted, limit, plan = case
    again = make_plan(Target("x", (FileSet(tuple(wanted), limit=limit),), {}))
    assert again.hash == plan.hash
    renamed = [Output(f"{o.name}_", o.canonical, o.recipe, o.dtype) for o in wanted]
    assert make_plan(Target("x", (FileSet(tuple(renamed), limit=limit),), {})).hash != plan.hash


@given(st.integers(1, 10**15), st.sampled_from([("", 1), ("B", 1), ("KB", 10**3), ("MiB", 2**20), ("GB", 10**9)]))
def test_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    for text in (f"{number}{name}", f" {number} {name.lower()} ", f"{number}.0{name}"):
        assert parse_size(text) == number * factor
