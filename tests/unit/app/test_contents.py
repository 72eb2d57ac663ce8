"""Which files of a folder are published."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from llava_convert.app.publish.contents import names
from llava_convert.core.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "llm/model.safetensors", ".cache/x", ".out.partial/y", "llm/.git/config"):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    return tmp_path / "model"


def unlistable(monkeypatch: pytest.MonkeyPatch, hidden: Path) -> None:
    """As the system answers who may not list a folder; the tests may run as one who may."""
    really = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == hidden:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_what_others_leave_in_a_folder_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlistable(monkeypatch, folder / ".cache")
    assert names(folder) == ["config.json", "llm/model.safetensors"]


@pytest.mark.parametrize("within", ["", "llm"])
def test_a_folder_that_may_not_be_listed_is_not_empty(
    folder: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    unlistable(monkeypatch, folder / within)
    with pytest.raises(InputError, match="cannot be read: Permission denied") as caught:
        names(folder)
    assert str(folder / within) in caught.value.message and caught.value.hint


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="holds nothing to publish") as caught:
        names(tmp_path)
    assert caught.value.hint
