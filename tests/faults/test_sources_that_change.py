"""A source is cut, exchanged or rewritten while it is read: that is noticed, or OUT is that of one state of it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.corpus import Corpus, accepted, edit_json, tree
from tests.faults.system_calls import SOURCE, Job, shimmed
from tests.hubs.runner import Runner

pytestmark = pytest.mark.slow

SEED, SAMPLE = 72, 8
# Commands of the shell, in the folder of the test: `other` is another model of the same shapes.
CHANGES = {
    "cut": "for f in source/*.safetensors; do truncate -s -1 $f; done",
    "emptied": "for f in source/*.safetensors; do : > $f; done",
    "gone": "rm -r source",
    "renamed over": "cp -r other copy && for f in copy/*; do mv $f source/; done",
    "rewritten in place": "for f in other/*; do cat $f > source/${f#other/}; done",
    "folders exchanged": "mv source was && cp -r other source",
}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with shimmed() as made:
        yield made


def another(model: Path) -> None:
    """Another model of the same sizes: each weight has the other sign, and each config says another number."""
    for path in model.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:start])
        assert {about["dtype"] for name, about in header.items() if name != "__metadata__"} == {"F16"}
        data[start + 1 :: 2] = bytes(byte ^ 0x80 for byte in data[start + 1 :: 2])
        path.write_bytes(data)
    config = json.loads((model / "config.json").read_text())
    edit_json(model / "config.json", text_config=config["text_config"] | {"rms_norm_eps": 3e-05})


def make_job(runner: Runner, corpus: Corpus, folder: Path, to: str) -> tuple[Job, tuple[dict[str, str], ...]]:
    """A job, and what it makes of either state of its source."""
    shutil.copytree(corpus.layouts["hf"], folder / "first")
    shutil.copytree(folder / "first", folder / "other")
    another(folder / "other")
    made = []
    for state in ("first", "other"):
        shutil.copytree(folder / state, folder / "source")
        out = folder / "states" / state / "out"
        accepted("hf", folder / "source", "--to", to, "-o", out)
        made.append(tree(out))
        shutil.rmtree(folder / "source")
    shutil.copytree(folder / "first", folder / "source")
    assert made[0] != made[1]
    return Job(runner, folder, folder / "source", ("hf", folder / "source", "--to", to)), tuple(made)


def changed(job: Job, states: tuple[dict[str, str], ...], change: str, at: int) -> str:
    """What is not as it must be when the source changes before call `at`; "" where all is right."""
    for name in ("source", "was", "copy"):
        shutil.rmtree(job.folder / name, ignore_errors=True)
    shutil.copytree(job.folder / "first", job.source)
    job.restore()
    tried = job.run(at=at, paths=job.source, run=f"cd {job.folder} && {CHANGES[change]}")
    ran, there = tried.ran, tree(job.out)
    beside = [p.name for p in job.out.parent.iterdir() if p != job.out]
    if ran.code == 0 and there in states and not beside:
        return ""
    if ran.code in (3, 4, 7) and there == job.old and not beside and "Traceback" not in ran.said:
        return ""
    mixed = [name for name in there if not any(there[name] == state.get(name) for state in states)]
    return f"{change} at {at} {tried.struck}: exit {ran.code}, {beside}, of neither state: {mixed}\n{ran.said}"


def points(job: Job) -> range:
    return range(1, len([call for call in job.calls() if job.side(call) == SOURCE]) + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_fault_72_a_source_changes_at_a_sample_of_calls(
    runner: Runner, corpus: Corpus, tmp_path: Path, change: str
) -> None:
    job, states = make_job(runner, corpus, tmp_path, "official")
    sample = random.Random(SEED).sample(points(job), SAMPLE)
    assert [wrong for at in sorted(sample) if (wrong := changed(job, states, change, at))] == []


@pytest.mark.sweep
@pytest.mark.parametrize("to", ["official", "gguf"])
@pytest.mark.parametrize("change", CHANGES)
def test_fault_72_a_source_changes_at_each_call(
    runner: Runner, corpus: Corpus, tmp_path: Path, change: str, to: str
) -> None:
    job, states = make_job(runner, corpus, tmp_path, to)
    assert [wrong for at in points(job) if (wrong := changed(job, states, change, at))] == []


@pytest.mark.parametrize("gone", ["made/.out.partial", "made"])
def test_the_place_of_the_output_is_removed_meanwhile(
    runner: Runner, corpus: Corpus, tmp_path: Path, gone: str
) -> None:
    """Exit 6, or 0 with all of OUT where it came too late to matter; nothing half is there."""
    job, states = make_job(runner, corpus, tmp_path, "official")
    ops = ",create,write,copy,sync,truncate,rename,"
    job.restore()
    calls = job.run(at=0, ops=ops, paths=job.out.parent).calls
    moment = next(n for n, call in enumerate(calls, 1) if (call.op, call.path) == ("rename", job.out))
    for at in range(1, moment + 1, max(1, moment // SAMPLE)):
        job.restore()
        ran = job.run(at=at, ops=ops, paths=job.out.parent, run=f"rm -rf {tmp_path / gone}").ran
        there = tree(job.out) if job.out.exists() else {}
        assert (ran.code == 0 and there == states[0]) or (ran.code == 6 and there in (job.old, {})), (at, ran.said)
        assert "Traceback" not in ran.said and not [p for p in job.out.parent.glob(".out*")], (at, ran.said)
