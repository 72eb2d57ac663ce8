"""`doctor`'s rules for transformers 4.x, in 4.57 and 4.46: what is planted fails there, repaired it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llava_convert
from tests.doctor_faults import planted
from tests.interop.peer_programs import in_peer

pytestmark = pytest.mark.peers
FAULTS = ("rope_parameters", "TokenizersBackend", "nested image processor", "vocab_size of another")
THETA = 500_000


@pytest.fixture(scope="module", params=["4.57", "4.46"])
def opened(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=folder / "good")
    folders = {"good": folder / "good"}
    for fault in FAULTS:
        folders[fault] = planted(folder / "good", folder / fault, fault)
        folders[f"{fault}, repaired"] = planted(folder / "good", folder / f"{fault} r", fault)
        llava_convert.doctor(folders[f"{fault}, repaired"], consumer=f"transformers@{request.param}", fix=True)
    job = {"folders": {name: str(path) for name, path in folders.items()}}
    return {"version": request.param, **in_peer(f"transformers-{request.param}", "open_hf.py", job, folder)}


def test_a_sound_folder_opens(opened: dict[str, Any]) -> None:
    sound = {"rope_theta": THETA, "processor": "", "tokenizer": "", "model": ""}
    assert opened["good"] == sound
    assert {name: found for name, found in opened.items() if "repaired" in name} == {
        f"{fault}, repaired": sound for fault in FAULTS
    }


def test_each_fault_is_one(opened: dict[str, Any]) -> None:
    assert opened["rope_parameters"]["rope_theta"] == 10_000
    assert "size" in opened["vocab_size of another"]["model"]
    assert "TokenizersBackend" in opened["TokenizersBackend"]["tokenizer"]
    assert (opened["nested image processor"]["processor"] != "") == (opened["version"] == "4.46")
