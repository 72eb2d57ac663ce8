"""How often the bytes of an output are read until they are on a hub: a digest that is known is not made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.system_calls import shimmed
from tests.hubs.conftest import Side, arrived
from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Ran, Runner

pytestmark = pytest.mark.slow  # a process of its own, which counts


@pytest.fixture(scope="module")
def counted(huggingface: HuggingFace, modelscope: ModelScope) -> Iterator[Runner]:
    with shimmed(huggingface.env | modelscope.env) as runner:
        yield runner


def readings(runner: Runner, out: Path, *command: str | Path) -> tuple[Ran, Counter[str]]:
    """The command, and for each file of weights how many bytes of it were read, in the output's place or in staging."""
    log = out.parent / "reads"
    log.unlink(missing_ok=True)
    staged = out.with_name(f".{out.name}.partial")
    ran = runner(*command, FAULT_PATHS=f"{out}:{staged}", FAULT_READS=str(log), FAULT_OPS=",none,")
    found: Counter[str] = Counter()
    for line in log.read_text(encoding="utf-8").splitlines():
        size, path = line.split(" ", 1)
        if path.endswith(".safetensors"):
            found[Path(path).name] += int(size)
    return ran, found


def times(found: Counter[str], out: Path) -> dict[str, int]:
    """How often each file was read whole: headers are read besides."""
    return {name: size // (out / name).stat().st_size for name, size in found.items()}


def test_push(side: Side, counted: Runner, tiny: Path, tmp_path: Path) -> None:
    """Once to hash it, for the record, the proof and the hub; once to compare it with the source; once to send it."""
    out = tmp_path / "out"
    words = ["pth", tiny / "iter_2.pth", "--to", "official", "-o", out, "--max-shard-size", "200kB"]
    ran, found = readings(counted, out, *words, "--push", "org/model", "--hub", side.name)
    assert ran.code == 0, ran.said
    arrived(side, "org/model", out)
    assert times(found, out) == dict.fromkeys(found, 3)
    assert len(found) == 2


def test_upload(side: Side, counted: Runner, copied: Path) -> None:
    """Once to hash it, once to send it."""
    ran, found = readings(counted, copied, "upload", copied, "org/model", "--hub", side.name)
    assert ran.code == 0, ran.said
    arrived(side, "org/model", copied)
    assert times(found, copied) == dict.fromkeys(found, 2)
    assert len(found) == 2
