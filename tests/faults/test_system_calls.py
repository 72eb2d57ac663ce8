"""Each system call on the files of a job fails, one in a run: the right exit code, the old output kept, nothing left.

Here a seeded sample of the calls is tried; `make faults` tries them all.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.corpus import TINY, Corpus, accepted
from tests.faults.system_calls import OUTPUT, SOURCE, Job, shimmed, sweep
from tests.hubs.huggingface import HuggingFace
from tests.hubs.runner import Runner

pytestmark = pytest.mark.slow

JOBS = ("pth-hf", "hf-official", "hf-gguf", "gguf-hf")
SEED = 68
SAMPLE = 10
# A disk that is full goes on being full, and what is removed does not need it.
FILLS = ",create,write,copy,clone,truncate,sync,mkdir,rename,"


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with shimmed() as made:
        yield made


@pytest.fixture(scope="module")
def gguf(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "gguf"
    accepted("hf", corpus.layouts["hf"], "--to", "gguf", "-o", out)
    return out


@pytest.fixture
def make_job(runner: Runner, corpus: Corpus, gguf: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job by its name, alone in the test's folder."""

    def make(name: str, *, force: bool = True) -> Job:
        layout, _, to = name.partition("-")
        source = tmp_path / "source"
        if layout == "pth":
            shutil.copytree(TINY, source)
            args: tuple[str | Path, ...] = ("pth", source / "iter_2.pth")
            args += ("--llm", source / "llm", "--visual-encoder", source / "vit")
        else:
            shutil.copytree(gguf if layout == "gguf" else corpus.layouts[layout], source)
            args = (layout, source)
        return Job(runner, tmp_path, source, (*args, "--to", to, "--max-shard-size", "200kB", "-q"), force)

    return make


def sampled(job: Job, count: int) -> list[int]:
    """Some calls of each side, the same in each run of the tests."""
    chance = random.Random(SEED)
    found: list[int] = []
    for side in (SOURCE, OUTPUT):
        points = [n for n, call in enumerate(job.calls(), 1) if job.side(call) == side]
        assert len(points) > 20
        found += chance.sample(points, count)
    return sorted(found)


@pytest.mark.parametrize("name", JOBS)
def test_a_sample_of_calls_fails(make_job: Callable[..., Job], name: str) -> None:
    job = make_job(name)
    assert sweep(job, sampled(job, SAMPLE)) == []


@pytest.mark.sweep
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("name", JOBS)
def test_each_call_fails(make_job: Callable[..., Job], name: str, force: bool) -> None:
    job = make_job(name, force=force)
    assert sweep(job, range(1, len(job.calls()) + 1)) == []


def test_calls_fail_around_the_moment_when_out_is_put_in_place(make_job: Callable[..., Job]) -> None:
    """Before it the old output stays; after it the new one is there, and the exit code says so."""
    job = make_job("hf-official")
    calls = job.calls()
    moment = next(n for n, call in enumerate(calls, 1) if (call.op, call.path) == ("rename", job.out))
    assert moment < len(calls) - 10
    assert sweep(job, range(moment - 6, len(calls) + 1)) == []


@pytest.mark.parametrize("force", [True, False])
def test_fault_66_the_disk_is_full_from_some_call_on(make_job: Callable[..., Job], force: bool) -> None:
    """Another program fills it: exit 6, or 0 where no byte was lacking any more."""
    job = make_job("hf-official", force=force)
    fault = {"ops": FILLS, "keep": 1, "errno": errno.ENOSPC}
    job.restore()
    total = len(job.run(at=0, ops=FILLS).calls)
    assert total > 20
    assert sweep(job, range(1, total + 1, 3), **fault) == []
    job.restore()
    ran = job.run(at=1, **fault).ran
    assert ran.code == 6 and "No space left on device" in ran.stderr and "free some space" in ran.stderr


@pytest.mark.parametrize("name", JOBS)
def test_the_disk_of_the_source_is_gone_from_some_call_on(make_job: Callable[..., Job], name: str) -> None:
    job = make_job(name)
    points = [n for n in sampled(job, SAMPLE) if job.side(job.calls()[n - 1]) == SOURCE]
    where = {"paths": job.source, "keep": 1, "errno": errno.EIO}
    assert sweep(job, points[::2], **where) == []


@pytest.mark.parametrize("code", [0, errno.EIO])
def test_the_shim_strikes(make_job: Callable[..., Job], code: int) -> None:
    """The tests above would pass if nothing failed: this one would not."""
    job = make_job("hf-official")
    job.restore()
    tried = job.run(at=1, ops=",sync,", errno=code or errno.ENOSPC)
    assert tried.struck is not None and tried.struck.op == "sync" and tried.ran.code == 6
    reason = "Input/output error" if code else "No space left on device"
    assert f"cannot be written: {reason}" in tried.ran.stderr


# -- upload


@pytest.fixture(scope="module")
def verified(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified") / "model"
    accepted("hf", corpus.layouts["hf"], "--to", "official", "-o", out, "--verify", "full")
    return out


def uploads_wrong(hub: HuggingFace, runner: Runner, folder: Path, log: Path, at: int, **fault: object) -> str:
    """What is not as it must be when call `at` of an upload fails; "" where all is right."""
    hub.repos.clear()
    hub.objects.clear()
    log.unlink(missing_ok=True)
    shim = {"FAULT_PATHS": str(folder), "FAULT_LOG": str(log), "FAULT_AT": str(at)}
    ran = runner("upload", folder, "org/model", **shim)
    struck = log.read_text().splitlines()[0] if log.exists() else "nothing"
    there = hub.repos["org/model"].files("main") if "org/model" in hub.repos else {}
    whole = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} <= set(there)
    hint = ran.code == 0 or (ran.stderr.count("error: ") == 1 and "\n  → " in ran.stderr)
    right = (ran.code == 0 and whole) or (ran.code == 3 and hint)
    return "" if right and "Traceback" not in ran.said else f"{at} {struck}: exit {ran.code}\n{ran.said}"


@pytest.fixture(scope="module")
def hub_runner() -> Iterator[tuple[HuggingFace, Runner]]:
    with HuggingFace() as hub, shimmed(hub.env) as made:
        yield hub, made


def upload_calls(hub: HuggingFace, runner: Runner, folder: Path, log: Path) -> int:
    assert uploads_wrong(hub, runner, folder, log, 0) == ""
    return len(log.read_text().splitlines())


def test_a_sample_of_calls_fails_in_an_upload(
    hub_runner: tuple[HuggingFace, Runner], verified: Path, tmp_path: Path
) -> None:
    hub, runner = hub_runner
    total = upload_calls(hub, runner, verified, tmp_path / "log")
    assert total > 50
    points = random.Random(SEED).sample(range(1, total + 1), 2 * SAMPLE)
    assert [w for at in points if (w := uploads_wrong(hub, runner, verified, tmp_path / "log", at))] == []


@pytest.mark.sweep
def test_each_call_fails_in_an_upload(hub_runner: tuple[HuggingFace, Runner], verified: Path, tmp_path: Path) -> None:
    hub, runner = hub_runner
    total = upload_calls(hub, runner, verified, tmp_path / "log")
    points = range(1, total + 1)
    assert [w for at in points if (w := uploads_wrong(hub, runner, verified, tmp_path / "log", at))] == []
