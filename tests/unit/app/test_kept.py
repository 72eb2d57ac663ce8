"""Which outputs stay in memory after they were written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import llava_convert
from llava_convert.app import convert
from llava_convert.storage import ranges

SOURCE = Path(__file__).parents[3] / "fixtures" / "tiny" / "iter_2.pth"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RWF_DONTCACHE is Linux's")


@pytest.mark.parametrize(
    ("large", "verify", "kept"), [(True, "quick", False), (True, "full", True), (False, "quick", True)]
)
def test_a_large_output_leaves_the_memory_unless_it_is_read_again(
    large: bool, verify: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava_convert.convert(SOURCE, to="hf", out=tmp_path / "usual")
    flags: list[int] = []
    written = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int, flag: int) -> int:
        flags.append(flag)
        return written(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(convert, "worth_keeping", lambda nbytes: not large)
    llava_convert.convert(SOURCE, to="hf", out=tmp_path / "out", verify=verify)
    assert (flags == []) is kept
    for file in (tmp_path / "usual").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_large_is_beside_the_memory_of_the_machine() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert ranges.worth_keeping(memory // 17)
    assert not ranges.worth_keeping(memory // 15)
