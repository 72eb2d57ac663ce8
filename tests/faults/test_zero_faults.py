"""Incomplete, mixed, damaged and hostile DeepSpeed directories: row 44 of the fault list; also rows 23, 35 and 40."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_convert.core.errors import ConvertError, InputError, UnsafeError, UnsupportedError
from llava_convert.layouts.registry import open_checkpoint
from llava_convert.storage.zero import checkpoint as zero
from llava_convert.storage.zero.checkpoint import read_zero
from tests.zero_folders import Save, write

SAVE = Save({"llm.a": torch.randn(9, 5), "llm.b": torch.randn(7)}, ranks=3)
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def refusal(folder: Path, kind: type[ConvertError], *fragments: str) -> ConvertError:
    """The error that reading gives: one printable line, and a way out where files are missing or mixed."""
    with pytest.raises(ConvertError) as caught:
        read_zero(folder)
    error = caught.value
    assert type(error) is kind, error.message
    assert error.message.isprintable() and len(error.message) < 1000
    for fragment in fragments:
        assert fragment in error.message
    return error


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a state, let `change` alter it, save it again."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_optim(path: Path, **values: Any) -> None:
    edit(path, lambda state: state["optimizer_state_dict"].update(values))


# -- files that are not there --------------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named(tmp_path: Path, stage: int, rank: int) -> None:
    save = replace(SAVE, stage=stage)
    name = save.optim_file(rank)
    (write(tmp_path, save) / name).unlink()
    assert refusal(tmp_path, InputError, name, "missing").hint


def test_several_missing_ranks(tmp_path: Path) -> None:
    save = replace(SAVE, ranks=6)
    write(tmp_path, save)
    for rank in (3, 4, 5):
        (tmp_path / save.optim_file(rank)).unlink()
    refusal(tmp_path, InputError, save.optim_file(3), "2 more", "6 ranks saved this")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_missing_model_states_of_a_zero3_rank(tmp_path: Path, rank: int) -> None:
    save = replace(SAVE, stage=3)
    (write(tmp_path, save) / save.model_file(rank)).unlink()
    refusal(tmp_path, InputError, save.model_file(rank), "missing")


@STAGES
def test_missing_model_states(tmp_path: Path, stage: int) -> None:
    save = replace(SAVE, stage=stage)
    write(tmp_path, save)
    for path in tmp_path.glob("*_model_states.pt"):
        path.unlink()
    refusal(tmp_path, InputError, "mp_rank_00_model_states.pt", "missing")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_zero3_placeholders_are_no_weights(tmp_path: Path, half: torch.dtype) -> None:
    save = replace(SAVE, stage=3, optimizer=False, half=half)
    error = refusal(write(tmp_path, save), InputError, save.optim_file(0), "missing", "2 weights", "llm.a, llm.b")
    assert "*_optim_states.pt of every rank" in (error.hint or "")


def test_a_placeholder_that_no_shape_fills(tmp_path: Path) -> None:
    save = replace(SAVE, stage=3)
    write(tmp_path, save)
    for rank in range(3):
        edit(tmp_path / save.model_file(rank), lambda state: state["module"].update({"llm.c": torch.empty(0)}))
    refusal(tmp_path, InputError, save.model_file(0), "1 weights that no file holds: llm.c")


def test_latest(tmp_path: Path) -> None:
    write(tmp_path / "global_step1", SAVE)
    pointer = tmp_path / "latest"
    for tag in ("global_step2", "", "\n", "a\x00b", "x" * 5000):
        pointer.write_text(tag)
        with pytest.raises((InputError, UnsafeError), match="latest"):
            read_zero(tmp_path)
    pointer.write_text("global_step2")
    error = refusal(tmp_path, InputError, "latest", "global_step2", "there are global_step1")
    assert error.hint == "give the folder of one save"
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)
    (tmp_path / "global_step2").mkdir()
    refusal(tmp_path, InputError, "global_step2", "has no *_model_states.pt")


@pytest.mark.parametrize("tag", ["../other", "/tmp/other", "C:\\other", "a/../../other"])
def test_latest_leads_out(tmp_path: Path, tag: str) -> None:
    write(tmp_path / "other", SAVE)
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    (folder / "latest").write_text(tag)
    refusal(folder, UnsafeError, "latest")


def test_empty_folder(tmp_path: Path) -> None:
    refusal(tmp_path, InputError, str(tmp_path))
    refusal(tmp_path / "none", InputError, "none")


# -- files of two saves --------------------------------------------------------------------------------------------


@STAGES
def test_a_rank_of_another_step(tmp_path: Path, stage: int) -> None:
    """The one mistake that nothing else shows: all sizes fit."""
    save = replace(SAVE, stage=stage)
    write(tmp_path, save)
    write(tmp_path / "later", replace(save, step=7))
    (tmp_path / "later" / save.optim_file(1)).replace(tmp_path / save.optim_file(1))
    refusal(tmp_path, InputError, save.optim_file(1), "at step 7", "at step 3", "mixes two saves")


def test_model_states_of_another_step(tmp_path: Path) -> None:
    save = replace(SAVE, stage=3)
    write(tmp_path, save)
    write(tmp_path / "later", replace(save, step=7))
    (tmp_path / "later" / save.model_file(2)).replace(tmp_path / save.model_file(2))
    refusal(tmp_path, InputError, save.model_file(2), "at step 7", "mixes two saves")


def test_step_of_the_fused_optimizer(tmp_path: Path) -> None:
    """DeepSpeed's FusedAdam keeps its step with the groups, as a plain number."""
    write(tmp_path, SAVE)
    for rank in range(3):
        base = {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"step": 3 + rank // 2}]}
        edit_optim(tmp_path / SAVE.optim_file(rank), base_optimizer_state=base)
    refusal(tmp_path, InputError, SAVE.optim_file(2), "at step 4")


def test_bf16_and_fp16(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    write(tmp_path, replace(SAVE, half=torch.float16))
    refusal(tmp_path, InputError, "mixes two saves", SAVE.optim_file(0))


def test_zero2_and_zero3(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    write(tmp_path, replace(SAVE, stage=3))
    refusal(tmp_path, InputError, "mixes two saves", "mp_rank_00_model_states.pt")
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    write(tmp_path / "two", SAVE)
    (tmp_path / "two" / SAVE.optim_file(2)).replace(tmp_path / SAVE.optim_file(2))
    refusal(tmp_path, InputError, SAVE.optim_file(2), "ZeRO-2", "mixes two saves")


def test_same_rank_twice(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    (tmp_path / "bf16_zero_pp_rank_01_mp_rank_00_optim_states.pt").write_bytes(b"")
    refusal(tmp_path, InputError, "of the same rank")


@STAGES
def test_ranks_left_over_from_a_larger_run(tmp_path: Path, stage: int) -> None:
    save = replace(SAVE, stage=stage)
    write(tmp_path, replace(save, ranks=4))
    write(tmp_path, save)
    refusal(tmp_path, InputError, "was saved by 4 ranks", "by 3", "mixes two saves")


@STAGES
def test_model_states_tell_another_number_of_ranks(tmp_path: Path, stage: int) -> None:
    save = replace(SAVE, stage=stage)
    write(tmp_path, save)
    edit(tmp_path / save.model_file(), lambda state: state.update(dp_world_size=2))
    refusal(tmp_path, InputError, save.model_file(), "2 ranks", "by 3")


@pytest.mark.parametrize("counts", [[3, 2], [], None, "3", [True], [-3], 0, [3, [3]]])
def test_partition_count_that_is_no_number(tmp_path: Path, counts: Any) -> None:
    write(tmp_path, SAVE)
    edit_optim(tmp_path / SAVE.optim_file(1), partition_count=counts)
    refusal(tmp_path, InputError, SAVE.optim_file(1), "partition_count")


def test_groups_differ(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    write(tmp_path / "two", replace(SAVE, groups=[["llm.a"], ["llm.b"]]))
    (tmp_path / "two" / SAVE.optim_file(0)).replace(tmp_path / SAVE.optim_file(0))
    refusal(tmp_path, InputError, SAVE.optim_file(0), "2 groups", "has 1")


def test_masters_of_two_dtypes(tmp_path: Path) -> None:
    for stage in (2, 3):
        save = replace(SAVE, stage=stage)
        folder = write(tmp_path / str(stage), save)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = torch.load(folder / save.optim_file(1), weights_only=True)
        halves = [vector.half() for vector in state["optimizer_state_dict"][key]]
        edit_optim(folder / save.optim_file(1), **{key: halves})
        refusal(folder, InputError, save.optim_file(1), "F16", "F32")


# -- shapes and sizes ----------------------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_partition_shorter_than_its_shapes(tmp_path: Path, stage: int, rank: int) -> None:
    save = replace(SAVE, stage=stage)
    write(tmp_path, save)
    path = tmp_path / save.optim_file(rank)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    vector = torch.load(path, weights_only=True)["optimizer_state_dict"][key][0]
    edit_optim(path, **{key: [vector[:-1].clone()]})
    refusal(tmp_path, InputError, path.name, f"holds {len(vector) - 1} elements", save.model_file())


@STAGES
def test_shapes_of_another_model(tmp_path: Path, stage: int) -> None:
    save = replace(SAVE, stage=stage)
    for shape, word in (((9, 50), "need"), ((1, 1), "need")):
        write(tmp_path, save)
        for path in tmp_path.glob("*_model_states.pt"):
            edit(path, lambda state, shape=shape: state["param_shapes"][0].update({"llm.a": torch.Size(shape)}))
            edit(path, lambda state: state["module"].clear())
        refusal(tmp_path, InputError, word)


@pytest.mark.parametrize("shape", [(9, -5), (1 << 50,), [3.5], None, "45", (True, 45), tuple([1] * 65)])
def test_unsound_shape(tmp_path: Path, shape: Any) -> None:
    write(tmp_path, SAVE)
    edit(tmp_path / SAVE.model_file(), lambda state: state["param_shapes"][0].update({"llm.\na": shape}))
    refusal(tmp_path, InputError, SAVE.model_file(), "llm.\\na", "sound shape")


def test_module_and_shapes_disagree(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    edit(tmp_path / SAVE.model_file(), lambda state: state["module"].update({"llm.a": torch.zeros(5, 9)}))
    refusal(tmp_path, InputError, SAVE.model_file(), "llm.a", "[5, 9]", "[9, 5]")


@pytest.mark.parametrize("value", [None, [], {}, [{}], 7])
def test_param_shapes_missing_or_odd(tmp_path: Path, value: Any) -> None:
    write(tmp_path, SAVE)
    edit(tmp_path / SAVE.model_file(), lambda state: state.update(param_shapes=value))
    refusal(tmp_path, InputError, "_states.pt")


def test_a_parameter_in_two_groups(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    edit(tmp_path / SAVE.model_file(), lambda state: state["param_shapes"].append({"llm.b": torch.Size([7])}))
    refusal(tmp_path, InputError, SAVE.model_file(), "twice")


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_fragment_missing_or_short(tmp_path: Path, rank: int) -> None:
    save = replace(SAVE, stage=3, frozen={"vit.a": torch.randn(10)})
    for fragments in ({}, {"vit.a": torch.zeros(3)}, {"vit.a": torch.zeros(8)[::2]}):
        write(tmp_path, save)
        path = tmp_path / save.model_file(rank)
        edit(path, lambda state, fragments=fragments: state.update(frozen_param_fragments=fragments))
        refusal(tmp_path, InputError, path.name, "vit.a")


def test_frozen_quantised_fragments(tmp_path: Path) -> None:
    """ZeRO++ may quantise frozen parameters (`zero_quantized_nontrainable_weights`); their scale is not saved."""
    save = replace(SAVE, stage=3, frozen={"vit.a": torch.randn(9)})
    write(tmp_path, save)
    for rank in range(3):
        fragment = {"vit.a": torch.zeros(3, dtype=torch.int8)}
        edit(tmp_path / save.model_file(rank), lambda state, f=fragment: state.update(frozen_param_fragments=f))
    refusal(tmp_path, UnsupportedError, "vit.a", "I8")


def test_masters_that_repeat_themselves(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    edit_optim(tmp_path / SAVE.optim_file(0), single_partition_of_fp32_groups=[torch.zeros(1).expand(18)])
    refusal(tmp_path, InputError, SAVE.optim_file(0), "not a plain tensor")


@pytest.mark.parametrize("value", [None, {}, [7], [None], "x"])
def test_masters_that_are_none(tmp_path: Path, value: Any) -> None:
    write(tmp_path, SAVE)
    edit_optim(tmp_path / SAVE.optim_file(0), single_partition_of_fp32_groups=value)
    refusal(tmp_path, InputError, SAVE.optim_file(0))


@pytest.mark.parametrize("stage", [0, 3, 4, "2", None, True])
def test_unknown_stage(tmp_path: Path, stage: Any) -> None:
    write(tmp_path, SAVE)
    edit_optim(tmp_path / SAVE.optim_file(0), zero_stage=stage)
    refusal(tmp_path, InputError, SAVE.optim_file(0), "stage")


@pytest.mark.parametrize("content", [{}, [], None, 5, {"module": None, "buffer_names": []}, {"state_dict": {}}])
def test_other_torch_files_under_these_names(tmp_path: Path, content: Any) -> None:
    for name in (SAVE.model_file(), SAVE.optim_file(1)):
        write(tmp_path, SAVE)
        torch.save(content, tmp_path / name)
        refusal(tmp_path, InputError, name)


# -- damaged, hostile, of another kind -----------------------------------------------------------------------------


@STAGES
def test_truncated_rank(tmp_path: Path, stage: int) -> None:
    save = replace(SAVE, stage=stage)
    write(tmp_path, save)
    for name in (save.optim_file(2), save.model_file()):
        data = (tmp_path / name).read_bytes()
        for length in (0, 100, len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:length])
            refusal(tmp_path, InputError, name)
        (tmp_path / name).write_bytes(data)
    read_zero(tmp_path)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class _Open:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@STAGES
def test_nothing_is_run(tmp_path: Path, stage: int) -> None:
    """Row 35 for every file of the folder, the last rank's too."""
    save = replace(SAVE, stage=stage)
    canary = tmp_path / "canary"
    for name in (save.model_file(), save.optim_file(2)):
        folder = write(tmp_path / name, save)
        for hostile in (_Open(canary), _Touch(canary)):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps({"module": hostile}, protocol=2))
                archive.writestr("archive/byteorder", "little")
            with pytest.raises((UnsafeError, InputError)) as caught:
                read_zero(folder)
            assert name in caught.value.message and not canary.exists()
            assert isinstance(hostile, _Touch) or type(caught.value) is UnsafeError


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_2.pth", SAVE)
    path = folder / SAVE.optim_file(1)
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    refusal(folder, UnsafeError, SAVE.optim_file(1))


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    (tmp_path / SAVE.optim_file(1)).unlink()
    (tmp_path / SAVE.optim_file(1)).mkdir()
    refusal(tmp_path, InputError, SAVE.optim_file(1))


def test_more_pieces_than_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SAVE)
    monkeypatch.setattr(zero, "MAX_PIECES", 5)
    refusal(tmp_path, UnsafeError, "2 tensors on 3 ranks")


def test_a_rank_number_beyond_reason(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    (tmp_path / "bf16_zero_pp_rank_999999_mp_rank_00_optim_states.pt").write_bytes(b"")
    refusal(tmp_path, InputError, SAVE.optim_file(3), "missing")


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "layer_00-model_00-model_states.pt",
        "layer_0_expert_3_mp_rank_00_model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
def test_models_split_in_other_ways(tmp_path: Path, name: str) -> None:
    write(tmp_path, SAVE)
    (tmp_path / name).write_bytes(b"")
    refusal(tmp_path, UnsupportedError, name)


def test_sparse_tensor_in_module(tmp_path: Path) -> None:
    write(tmp_path, SAVE)
    edit(tmp_path / SAVE.model_file(), lambda state: state["module"].update({"vit.x": torch.eye(3).to_sparse()}))
    refusal(tmp_path, UnsupportedError, "vit.x", "sparse")
