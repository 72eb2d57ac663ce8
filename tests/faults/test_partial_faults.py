"""Checkpoints that are partial, or of another trainer's form: rows 37, 45 and 46 of the fault list."""

from __future__ import annotations

from pathlib import Path

import pytest

import llava_convert
from llava_convert.app.options import Options
from llava_convert.app.planning import prepare
from llava_convert.core.errors import InputError
from llava_convert.engine.record import stored_of
from llava_convert.storage.remote.session import Session
from llava_convert.storage.torch.file import read_torch


def test_fault_37_history_and_optimizer_are_ignored(tiny: Path, tmp_path: Path) -> None:
    """The weights come out; of the optimizer's state not one byte is planned to be read."""
    source = tiny / "iter_2.pth"
    root = read_torch(source).root
    assert {"message_hub", "optimizer", "param_schedulers"} <= root.keys()
    kept = {extent for state in root["optimizer"]["state"].values() for t in (state["exp_avg"], state["exp_avg_sq"])
            for extent in t.extents}  # fmt: skip
    plan = prepare(source, Options(to="xtuner", out=tmp_path / "out"), Session()).plan
    read = {extent for t in plan.tensors for stored in stored_of(t) for extent in stored.extents}
    assert kept and not kept & read
    inspected = llava_convert.inspect(source)
    assert any("HistoryBuffer" in detail for detail in inspected.details)


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
def test_fault_45_a_broken_distributed_checkpoint_is_named(tmp_path: Path, inner: str) -> None:
    folder = tmp_path / "checkpoint" / inner
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"\x80\x02}.")
    (folder / "__0_0.distcp").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"\.metadata: holds no Metadata"):
        llava_convert.convert(tmp_path / "checkpoint", to="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fault_46_a_partial_checkpoint_says_what_must_be_given(tiny: Path, tmp_path: Path) -> None:
    """Copied away from its bases: what needs none converts, what needs one names the option."""
    source = tmp_path / "iter_2.pth"
    source.write_bytes((tiny / "iter_2.pth").read_bytes())
    assert llava_convert.convert(source, to="xtuner", part="projector", out=tmp_path / "p").done
    with pytest.raises(InputError, match="base language model") as refused:
        llava_convert.convert(source, to="hf", out=tmp_path / "out")
    assert refused.value.exit_code == 3 and "llm=PATH" in str(refused.value.hint)
    with pytest.raises(InputError, match="base vision tower") as refused:
        llava_convert.convert(source, to="hf", llm=str(tiny / "llm"), out=tmp_path / "out")
    assert "visual_encoder=PATH" in str(refused.value.hint)
    made = llava_convert.convert(
        source, to="hf", llm=str(tiny / "llm"), visual_encoder=str(tiny / "vit"), out=tmp_path / "out"
    )
    assert made.done
