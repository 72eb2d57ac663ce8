"""An output at a URL that several runs write together, and one that the workers of a Dask cluster write."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_convert
from llava_convert.core.errors import HubError, InputError, OutputError, UnsafeError
from tests.faults.corpus import ROOT, shell, start, tree
from tests.remotes.conftest import HURRIED, weights_in
from tests.remotes.s3 import Store, account, read_back
from tests.remotes.test_urls import BREAKS

MORE = ("--max-shard-size", "100kB", "--name", "tiny")
RECORD = ".llava-convert-plan"
SEED, KILLS = 22, 20


def job(source: Path | str, out: Path | str, *more: str) -> tuple[str | Path, ...]:
    return ("convert", source, "--to", "hf", "-o", out, *MORE, *more)


def test_on_s3(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """Shares from S3 to S3, one of them doubled, one begun by a run that was killed."""
    s3.put(layouts["official"], "in")
    arguments = job("s3://models/in", "s3://models/out")
    early = s3.run(tmp_path, *arguments, "--finish")
    assert early.code == 6 and "are not there yet" in early.stderr, early.stderr
    killed = s3.run(tmp_path, *arguments, "--files", "1/2", code=BREAKS, FILES="4", HOW="killed")
    assert killed.code == -signal.SIGKILL
    for number in (1, 2, 2):
        ran = s3.run(tmp_path, *arguments, "--files", f"{number}/2")
        assert ran.code == 0, ran.stderr
    assert "files are there already" in ran.stderr, "the doubled share sends nothing again"
    left = s3.objects("out")
    assert "config.json" not in left and len([name for name in left if name.startswith(RECORD)]) == 4
    ran = s3.run(tmp_path, *arguments, "--finish")
    assert ran.code == 0, ran.stderr
    local = s3.run(tmp_path, *job(layouts["official"], "local"))
    assert local.code == 0, local.stderr
    assert read_back(s3, "out") == weights_in(tmp_path / "local")
    assert not [name for name in s3.objects("out") if name.startswith(RECORD)]
    late = s3.run(tmp_path, *arguments, "--files", "2/2")
    assert late.code == 6 and "exists" in late.stderr, late.stderr
    assert read_back(s3, "out") == weights_in(tmp_path / "local")


@pytest.mark.parametrize("how", ["network", "interrupted"])
def test_a_share_on_s3_that_breaks_off(s3: Store, layouts: dict[str, Path], tmp_path: Path, how: str) -> None:
    """What it had finished stays, and what others had; what was half sent goes."""
    arguments = job(layouts["official"], "s3://models/out")
    assert s3.run(tmp_path, *arguments, "--files", "1/2").code == 0
    before = s3.objects("out")
    broken = s3.run(tmp_path, *arguments, "--files", "2/2", code=BREAKS, FILES="5", HOW=how)
    assert broken.code == {"network": 8, "interrupted": 130}[how], broken.stderr
    assert before.items() <= s3.objects("out").items()
    assert s3.run(tmp_path, *arguments, "--files", "2/2").code == 0
    assert s3.run(tmp_path, *arguments, "--finish").code == 0
    assert s3.run(tmp_path, "verify", layouts["official"], "s3://models/out").code == 0


def test_another_source_on_s3(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    assert s3.run(tmp_path, *job(layouts["official"], "s3://models/out", "--files", "1/2")).code == 0
    before = s3.objects("out")
    for more in (("--files", "2/2"), ("--finish",)):
        ran = s3.run(tmp_path, *job(layouts["official"], "s3://models/out", "--dtype", "bfloat16", *more))
        assert ran.code == 6 and "files of another plan" in ran.stderr, ran.stderr
    assert s3.objects("out") == before


# --- Dask


def begin(which: str, folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """A real scheduler or worker in a process of its own, as `dask scheduler` and `dask worker` start it."""
    program = f"import sys; from distributed.cli import dask_{which}; dask_{which}.main(sys.argv[1:])"
    quiet = {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "5"} | environment
    more = ("--scheduler-file", str(folder / "scheduler.json"), "--no-dashboard")
    # Into a file: a pipe that nobody reads stops them once it is full.
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments, *more],
            stdout=log,
            stderr=log,
            text=True,
            env=os.environ | quiet,
            cwd=folder,
        )


def begin_worker(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return begin("worker", folder, environment, "--nthreads", "1", "--no-nanny")


@contextlib.contextmanager
def cluster(
    workers: int, folder: Path, environment: dict[str, str]
) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Its address, and its workers: those that are put into the list later end with it, too."""
    address = folder / "scheduler.json"
    scheduler = begin("scheduler", folder, environment, "--port", "0", "--host", "127.0.0.1")
    begun: list[subprocess.Popen[str]] = []
    try:
        while not address.exists():
            time.sleep(0.1)
            assert scheduler.poll() is None, (folder / "log").read_text()
        begun += [begin_worker(folder, environment) for _ in range(workers)]
        yield "dask://" + json.loads(address.read_text())["address"].removeprefix("tcp://"), begun
    finally:
        for process in (scheduler, *begun):
            process.kill()
        for process in (scheduler, *begun):
            process.wait()


@pytest.fixture(scope="module")
def dask(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    with cluster(2, tmp_path_factory.mktemp("cluster"), account(endpoint)) as found:
        yield found


def test_a_cluster_writes_the_bytes_of_one_process(
    dask: tuple[str, list[subprocess.Popen[str]]], s3: Store, layouts: dict[str, Path], tmp_path: Path
) -> None:
    """On disk, by Python and the command; and from S3 to S3 with no disk that they share."""
    llava_convert.convert(layouts["official"], to="hf", out=tmp_path / "alone", name="tiny", max_shard_size="100kB")
    ran = s3.run(tmp_path, *job(layouts["official"], "out", "--executor", dask[0]))
    assert ran.code == 0 and "2 workers" in ran.stderr, ran.stderr
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
    s3.put(layouts["official"], "in")
    ran = s3.run(tmp_path, *job("s3://models/in", "s3://models/out", "--executor", dask[0]))
    assert ran.code == 0, ran.stderr
    assert read_back(s3, "out") == weights_in(tmp_path / "alone")


def test_what_a_worker_refuses_is_told_here(
    dask: tuple[str, list[subprocess.Popen[str]]], layouts: dict[str, Path], tmp_path: Path
) -> None:
    """With the exit code that it has in one process, in one sentence."""
    (tmp_path / "out").mkdir()
    ran = shell(*job(layouts["official"], tmp_path / "out", "--executor", dask[0]))
    assert ran.code == 6 and len(ran.errors) == 1 and "exists" in ran.errors[0], ran.stderr
    assert tree(tmp_path) == {"out": "folder"}


def test_workers_that_are_lost(layouts: dict[str, Path], tmp_path: Path) -> None:
    """One of two is killed while the job runs: the other does what is left, and the bytes are the same."""
    arguments = (
        "convert",
        layouts["official"],
        "--to",
        "hf",
        "-o",
        "out",
        "--name",
        "tiny",
        "--max-shard-size",
        "20kB",
    )
    llava_convert.convert(layouts["official"], to="hf", out=tmp_path / "alone", name="tiny", max_shard_size="20kB")
    (tmp_path / "cluster").mkdir()
    with cluster(2, tmp_path / "cluster", {}) as (address, workers):
        running = start(*arguments, "--executor", address, cwd=tmp_path)
        staged = tmp_path / ".out.partial"
        while not (staged.exists() and len(list(staged.glob("*.safetensors"))) > 1):
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        workers[0].kill()
        said = running.communicate(timeout=120)
        assert running.returncode == 0, said
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "cluster", "out"]


@pytest.mark.sweep
def test_workers_are_killed(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """At moments chosen at random, from S3 to S3, another taking each one's place: nothing lost, nothing double."""
    chance, killed = random.Random(SEED), 0
    options = ("--name", "tiny", "--max-shard-size", "20kB")
    s3.put(layouts["official"], "in")
    ran = s3.run(tmp_path, "convert", "s3://models/in", "--to", "hf", "-o", "s3://models/alone", *options)
    assert ran.code == 0, ran.stderr
    wanted = s3.objects("alone")
    (tmp_path / "cluster").mkdir()
    with cluster(2, tmp_path / "cluster", s3.env) as (address, workers):
        while killed < KILLS:
            arguments = ("convert", "s3://models/in", "--to", "hf", "-o", "s3://models/out", *options)
            running = start(*arguments, "--executor", address, code=HURRIED, environment=s3.env, cwd=tmp_path)
            while not s3.objects("out"):
                assert running.poll() is None, running.communicate()
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1.5))
            if running.poll() is None:
                at = chance.randrange(2)
                workers[at].kill()
                workers[at].wait()
                workers[at] = begin_worker(tmp_path / "cluster", s3.env)
                killed += 1
            said = running.communicate(timeout=600)
            assert running.returncode == 0, said
            found = s3.objects("out")
            assert sorted(found) == sorted(wanted)
            assert [name for name in wanted if found[name] != wanted[name]] == []
            for name in found:
                s3.client.delete_object(Bucket="models", Key=f"out/{name}")


def test_no_scheduler_is_there(layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_convert.app import cluster as module

    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    with pytest.raises(HubError, match="no scheduler answers"):
        llava_convert.convert(layouts["official"], to="hf", out=tmp_path / "out", executor="dask://127.0.0.1:1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [InputError, OutputError, UnsafeError])
def test_errors_travel_whole(kind: type[InputError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what", hint="how")))
    assert (type(again), again.message, again.hint, str(again)) == (kind, "what", "how", "what")
