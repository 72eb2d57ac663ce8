"""Every reader against its corpus and thousands of fixed mutations of it; `make fuzz` goes on from there."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_convert.core.errors import InputError, OutputError
from tests.fuzz.guard import FindingError, accepts, bounded
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

MUTATIONS = 400  # of each target
every_target = pytest.mark.parametrize("name", TARGETS)


@every_target
def test_corpus_is_taken_where_it_is_valid_and_else_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    taken = set()
    for seed, data in target.seeds().items():
        read = target.lay(data, tmp_path)
        with bounded():
            if accepts(read, tmp_path):
                taken.add(seed)
    assert {seed for seed in target.seeds() if seed.startswith("valid")} <= taken


@every_target
def test_mutations_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds().values())
    base = zlib.crc32(name.encode())
    taken = 0
    with bounded(60, peak=None):
        for number in range(base, base + MUTATIONS):
            data = mutated(seeds, target.words, number, target.limit)
            try:
                taken += accepts(target.lay(data, tmp_path), tmp_path)
            except FindingError as finding:
                raise FindingError(f"mutation {number} of {name}, {data[:2000]!r}: {finding}") from finding
    assert 0 < taken < MUTATIONS


def _importing() -> None:
    import this  # noqa: F401


@pytest.mark.parametrize(
    "harm",
    [
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=False),
        lambda: socket.socket().close(),
        lambda: exec("pass"),
        lambda: eval("1"),
        lambda: compile("1", "x", "eval"),
        lambda: Path("canary").write_bytes(b""),
        lambda: Path("canary").mkdir(),
        lambda: Path("/etc/hostname").read_bytes(),
        lambda: list(Path("/").iterdir()),
        _importing,
    ],
    ids=["system", "subprocess", "socket", "exec", "eval", "compile", "write", "mkdir", "read", "listdir", "import"],
)
def test_canary_sees(harm: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def swallowed() -> None:
        try:
            harm()
        except BaseException:
            raise InputError("a refusal that hides it") from None

    with pytest.raises(FindingError):
        accepts(swallowed, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RecursionError(), MemoryError(), OutputError("x"), InputError(""), InputError("x" * 9000)],
)
def test_only_refusals_that_can_be_shown_may_escape(error: Exception, tmp_path: Path) -> None:
    def read() -> None:
        raise error

    with pytest.raises(FindingError):
        accepts(read, tmp_path)


def test_reading_below_the_folder_and_parsing_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    assert accepts(lambda: (ast.parse((tmp_path / "x").read_text()), None)[1], tmp_path)


def test_time_and_memory_are_bounded() -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(FindingError, match="not done"), bounded(0.05):
        spin()
    with pytest.raises(FindingError, match="bytes"), bounded(peak=1 << 20):
        bytearray(2 << 20)
