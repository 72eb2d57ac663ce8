"""DeepSpeed directories: every tensor comes back bit for bit, whatever the stage, the ranks and the padding."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_convert.app.convert import convert
from llava_convert.app.inspect import inspect
from llava_convert.app.options import Options
from llava_convert.core.tensors import StoredTensor
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.streams import read_whole
from llava_convert.storage.torch.file import read_torch, state_dict
from llava_convert.storage.zero.checkpoint import ZeroCheckpoint, read_zero, recognise
from tests.zero_folders import Save, write

RANKS = (1, 2, 3, 5, 8)


def bits(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Floats of any bits, NaN and subnormals among them."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=source).view(torch.float32)


def weights(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"llm.{index}.weight": bits(shape, index) for index, shape in enumerate(shapes)}


def same(stored: StoredTensor, wanted: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes on disk are those of `wanted`."""
    found = b""
    for extent in stored.extents:
        with extent.path.open("rb") as stream:
            stream.seek(extent.offset)
            found += stream.read(extent.length)
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}[wanted.dtype]
    raw = wanted.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (stored.dtype, stored.shape, stored.strides) == (dtype, tuple(wanted.shape), None) and found == raw


def assert_holds(found: ZeroCheckpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.tensors[name].name == name
        assert same(found.tensors[name], tensor), name


shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=7)


@settings(max_examples=100, deadline=None)
@given(
    shapes=shapes,
    frozen=st.lists(st.lists(st.integers(1, 9), max_size=2).map(tuple), max_size=2),
    stage=st.sampled_from([1, 2, 3]),
    ranks=st.sampled_from(RANKS),
    cut=st.integers(0, 7),
    half=st.sampled_from([torch.float16, torch.bfloat16]),
    sub_groups=st.integers(1, 4),
    lean=st.booleans(),
    tied=st.booleans(),
)
def test_round_trip(
    shapes: list[tuple[int, ...]],
    frozen: list[tuple[int, ...]],
    stage: int,
    ranks: int,
    cut: int,
    half: torch.dtype,
    sub_groups: int,
    lean: bool,
    tied: bool,
) -> None:
    trained = weights(*shapes)
    names = list(trained)
    groups = [group for group in (names[cut:], names[:cut]) if group]  # of another order than the module's
    save = Save(
        trained,
        stage=stage,
        ranks=ranks,
        groups=groups,
        frozen={f"vit.{index}": bits(shape, 100 + index) for index, shape in enumerate(frozen)},
        tied={"llm.lm_head.weight": names[0]} if tied else {},
        buffers={"llm.ids": torch.arange(5), "llm.inv_freq": torch.rand(3)},
        half=half,
        sub_groups=sub_groups,
        lean=lean,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = read_zero(write(Path(folder), save))
        held = {name: tensor.to(half) for name, tensor in save.frozen.items()} | trained
        held |= {"llm.lm_head.weight": trained[names[0]]} if tied else {}
        assert_holds(found, {**held, **save.buffers})
    assert (found.stage, found.ranks, found.warnings) == (stage, ranks, ())
    assert found.notes == (f"float32 masters of {ranks} rank{'s' if ranks > 1 else ''}, ZeRO-{stage}",)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 13, 15, 16, 17, 31, 240])
def test_few_elements_for_many_ranks(tmp_path: Path, ranks: int, count: int) -> None:
    """Padding may be longer than a whole partition: then DeepSpeed's own slice of the last one goes wrong."""
    for stage in (1, 2, 3):
        trained = weights((count,))
        assert_holds(read_zero(write(tmp_path / str(stage), Save(trained, stage=stage, ranks=ranks))), trained)


def test_pieces_are_where_the_ranks_left_them(tmp_path: Path) -> None:
    """ZeRO-2 splits what crosses a boundary of ranks, ZeRO-3 everything."""
    trained = weights((10, 3), (7,), (1,))  # 38 elements: 40 with padding, 14 + 14 + 14 of 42 on three ranks
    two = read_zero(write(tmp_path / "2", Save(trained, ranks=3)))
    assert {name: [e.length // 4 for e in t.extents] for name, t in two.tensors.items()} == {
        "llm.0.weight": [14, 14, 2],
        "llm.1.weight": [7],
        "llm.2.weight": [1],
    }
    three = read_zero(write(tmp_path / "3", Save(trained, stage=3, ranks=3)))
    assert {name: [e.length // 4 for e in t.extents] for name, t in three.tensors.items()} == {
        "llm.0.weight": [10, 10, 10],
        "llm.1.weight": [3, 3, 1],
        "llm.2.weight": [1],
    }
    for rank, extent in enumerate(three.tensors["llm.0.weight"].extents):
        assert extent.path == tmp_path / "3" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    assert [path.name for path in two.files] == [
        "mp_rank_00_model_states.pt",
        *(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)),
    ]


def test_order_is_the_modules(tmp_path: Path) -> None:
    trained = weights((2,), (3,), (4,))
    names = list(trained)
    save = Save(trained, groups=[[names[2]], [names[1], names[0]]], frozen={"vit.0": bits((2,))})
    assert list(read_zero(write(tmp_path, save)).tensors) == ["vit.0", *names]


def test_ranks_are_numbers_not_words(tmp_path: Path) -> None:
    """Rank 10 comes after rank 9, not after rank 1."""
    trained = weights((11, 12))
    for stage in (2, 3):
        assert_holds(read_zero(write(tmp_path / str(stage), Save(trained, stage=stage, ranks=11))), trained)


def test_tied_shares_its_pieces(tmp_path: Path) -> None:
    trained = weights((6, 4), (5,))
    save = Save(trained, tied={"llm.lm_head.weight": "llm.0.weight"})
    for stage in (1, 2, 3):
        found = read_zero(write(tmp_path / str(stage), replace(save, stage=stage))).tensors
        assert found["llm.lm_head.weight"].extents == found["llm.0.weight"].extents


def test_a_view_that_shares_an_address_is_not_tied(tmp_path: Path) -> None:
    """`_get_shared_params` compares addresses; a shape tells that the two are not one."""
    save = Save(weights((6, 4), (5,)), tied={"llm.view": "llm.0.weight"})
    write(tmp_path, save)
    state = torch.load(tmp_path / save.model_file(), weights_only=True)
    state["module"]["llm.view"] = bits((3, 4)).bfloat16()
    torch.save(state, tmp_path / save.model_file())
    assert same(read_zero(tmp_path).tensors["llm.view"], state["module"]["llm.view"])


def test_name_tied_to_a_frozen_weight_that_was_left_out(tmp_path: Path) -> None:
    """xtuner leaves frozen weights out, but DeepSpeed still tells that two of them were tied."""
    save = Save(weights((6,)))
    for stage in (2, 3):
        folder = write(tmp_path / str(stage), replace(save, stage=stage))
        for path in folder.glob("*_model_states.pt"):
            state = torch.load(path, weights_only=True)
            state["shared_params"] = {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}
            torch.save(state, path)
        assert list(read_zero(folder).tensors) == ["llm.0.weight"]


def test_bfloat16_optimizer_tells_no_stage(tmp_path: Path) -> None:
    """runtime/bf16_optimizer.py: no `zero_stage`, padding kept; it partitions as ZeRO-1 does."""
    trained = weights((5, 3), (2,))
    save = Save(trained, stage=1, ranks=3, lean=False)
    write(tmp_path, save)
    for rank in range(3):
        state = torch.load(tmp_path / save.optim_file(rank), weights_only=True)
        del state["optimizer_state_dict"]["zero_stage"]
        torch.save(state, tmp_path / save.optim_file(rank))
    found = read_zero(tmp_path)
    assert found.stage == 1
    assert_holds(found, trained)


def test_padding_to_the_ranks_alone(tmp_path: Path) -> None:
    """Before partitions were aligned for NCCL the padding made a multiple of the ranks only."""
    flat = bits((11,))
    save = Save({"llm.0.weight": flat}, ranks=3)
    write(tmp_path, save)
    for rank in range(3):
        state = torch.load(tmp_path / save.optim_file(rank), weights_only=True)
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [flat[rank * 4 : rank * 4 + 4].clone()]
        torch.save(state, tmp_path / save.optim_file(rank))
    assert_holds(read_zero(tmp_path), {"llm.0.weight": flat})


@pytest.mark.parametrize("stage", [2, 3])
def test_latest_names_the_save(tmp_path: Path, stage: int) -> None:
    trained = weights((4, 4))
    write(tmp_path / "global_step1", Save(weights((4, 4)), stage=stage))
    write(tmp_path / "global_step2", Save({"llm.0.weight": bits((4, 4), 9)}, stage=stage))
    (tmp_path / "latest").write_text("global_step2\n")
    assert same(read_zero(tmp_path).tensors["llm.0.weight"], bits((4, 4), 9))
    (tmp_path / "latest").write_text("global_step1")
    assert_holds(read_zero(tmp_path), trained)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2])
def test_without_optimizer_states_the_module_counts_and_is_told(tmp_path: Path, stage: int, half: torch.dtype) -> None:
    trained = {"llm.0.weight": torch.randn(5, 3), "llm.1.weight": torch.randn(7)}
    save = Save(trained, stage=stage, ranks=3, half=half, optimizer=False)
    found = read_zero(write(tmp_path / "iter_2.pth", save))
    assert_holds(found, {name: tensor.to(half) for name, tensor in trained.items()})
    assert found.notes == () and (found.stage, found.ranks) == (stage, 1)
    (warning,) = found.warnings
    assert "iter_2.pth has no optimizer states" in warning and str(half).removeprefix("torch.") in warning


def test_optimizer_of_another_step_is_told(tmp_path: Path) -> None:
    """An optimizer may be new where weights were resumed, so that it is no error."""
    save = Save(weights((4,)))
    write(tmp_path, save)
    torch.save(
        {**torch.load(tmp_path / save.model_file(), weights_only=True), "global_steps": 40},
        tmp_path / save.model_file(),
    )
    (warning,) = read_zero(tmp_path).warnings
    assert "of step 39" in warning and "of step 3:" in warning


def test_recognise() -> None:
    assert recognise(["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
    assert recognise(["zero_pp_rank_3_mp_rank_00_model_states.pt"])
    assert recognise(["latest", "zero_to_fp32.py", "global_step10"])
    assert recognise(["latest", "config.json", "global_step10"]) is None, "a checkpoint of transformers"
    assert recognise(["config.json", "model.safetensors"]) is None
    assert recognise([]) is None


def test_reads_indexes_only(tmp_path: Path) -> None:
    """64 MiB of masters and moments cost no memory."""
    tensor = torch.zeros(8 << 20)
    folder = write(tmp_path, Save({"llm.0.weight": tensor, "llm.1.weight": torch.ones(3)}, ranks=2))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 64 << 20
    tracemalloc.start()
    try:
        found = read_zero(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert sum(tensor.nbytes for tensor in found.tensors.values()) == (32 << 20) + 12


def test_imports_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    write(tmp_path, Save(weights((4,))))
    code = (
        "import sys; from pathlib import Path; from llava_convert.storage.zero.checkpoint import read_zero; "
        "read_zero(Path(sys.argv[1])); assert not {'torch', 'deepspeed', 'mmengine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# -- as a source ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of the committed `iter_2.pth`, and its config."""
    file = read_torch(tiny / "iter_2.pth")
    with FilePool() as pool:
        tensors = {
            name: torch.from_numpy(read_whole(pool, stored).copy()) for name, stored in state_dict(file).tensors.items()
        }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    return tensors, file.root["meta"]["cfg"]


@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 8), (3, 5), (3, 8)])
@pytest.mark.parametrize("layout", ["xtuner", "official", "hf"])
def test_converts_as_the_file_does(
    tiny: Path,
    trained: tuple[dict[str, torch.Tensor], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    stage: int,
    ranks: int,
) -> None:
    """The same masters, merged and cast from pieces on many ranks: the same bytes."""
    monkeypatch.chdir(tiny.parent)
    tensors, cfg = trained
    save = Save(tensors, stage=stage, ranks=ranks, meta={"cfg": cfg, "iter": 2}, sub_groups=min(stage, 2))
    folder = write(tmp_path / "work" / "iter_2.pth", save)
    (folder.parent / "last_checkpoint").write_text("/home/someone/work_dirs/run/iter_2.pth")
    ours, theirs = tmp_path / "ours" / "model", tmp_path / "theirs" / "model"
    report = convert(folder.parent, Options(to=layout, out=ours, verify="full"))
    convert(tiny / "iter_2.pth", Options(to=layout, out=theirs))
    assert f"float32 masters of {ranks} ranks, ZeRO-{stage}" in report.notes
    assert report.source == folder
    files = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert files == {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    for file in files:
        if file.name == "conversion.json":
            continue
        if file.suffix == ".safetensors":
            assert contents(ours / file) == contents(theirs / file), file
        elif file.name != "README.md":
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


def contents(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Tensors by name; headers may be padded otherwise, since padding follows where the source's bytes lie."""
    from safetensors.torch import load_file

    return {name: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in load_file(path).items()}


def test_inspect_tells_of_the_fallback(
    tiny: Path, trained: tuple[dict[str, torch.Tensor], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    tensors, cfg = trained
    save = Save(tensors, meta={"cfg": cfg}, optimizer=False)
    found = inspect(write(tmp_path / "iter_2.pth", save))
    assert found.why == "a DeepSpeed directory (*_model_states.pt)"
    assert any("no optimizer states" in warning for warning in found.warnings)
    assert {dtype for part in found.parts for dtype in part.dtypes} == {"bfloat16"}


def test_wrapped_names_are_unwrapped(
    tiny: Path, trained: tuple[dict[str, torch.Tensor], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    tensors, cfg = trained
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    found = inspect(write(tmp_path / "iter_2.pth", Save(wrapped, stage=3, meta={"cfg": cfg})))
    assert "unwrapped _orig_mod." in found.notes
    assert sum(part.tensors for part in found.parts) == len(tensors)
    assert math.isclose(sum(part.bytes for part in found.parts), sum(t.nbytes for t in tensors.values()))
