"""Every checkpoint of a run, each converted once: on a disk and in a store, while new ones arrive, after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import llava_convert
from llava_convert.app import planning, sweep
from llava_convert.core.errors import HubError
from llava_convert.engine.plan import Plan
from llava_convert.model.target import Target
from tests.faults.corpus import TINY, run, start, trained, tree, write_pth
from tests.remotes.conftest import HURRIED, weights_in
from tests.remotes.s3 import Store, read_back

BASES = ("--llm", TINY / "llm", "--visual-encoder", TINY / "vit")
# The command with a line in a file for each request to a store: what it is, and how many bytes it sends.
COUNTS = HURRIED.replace(
    "from llava_convert.cli",
    "import os, s3fs\n"
    "call = s3fs.S3FileSystem._call_s3\n"
    "async def counted(self, method, *more, **given):\n"
    "    body = {**{key: value for one in more for key, value in dict(one).items()}, **given}.get('Body', b'')\n"
    "    size = len(body) if isinstance(body, bytes) else os.fstat(body.fileno()).st_size\n"
    "    with open(os.environ['COUNTS'], 'a') as log: print(method, size, file=log)\n"
    "    return await call(self, method, *more, **given)\n"
    "s3fs.S3FileSystem._call_s3 = counted\n"
    "from llava_convert.cli",
)
MORE = (*BASES, "--to", "hf", "--max-shard-size", "100kB")


def step(folder: Path, number: int, *, projector: float | None = None) -> Path:
    """A checkpoint of a run; with `projector` one that trained the projector alone, which differs by that factor."""
    folder.mkdir(exist_ok=True)
    path = folder / f"iter_{number}.pth"
    if projector is None:
        shutil.copy(TINY / "iter_2.pth", path)
        return path
    state, cfg = trained()
    cfg = cfg.replace("freeze_llm=False", "freeze_llm=True").replace("visual_encoder_lora=", "_unused=")
    return write_pth(path, {name: tensor * projector for name, tensor in state.items() if "projector" in name}, cfg)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (10, 2):
        step(Path("run"), number)
    torn = step(Path("run"), 30)
    os.truncate(torn, 5000)
    planned = run("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE, "--dry-run")
    assert planned.code == 3 and planned.stdout.count("to convert") == 2 and not Path("hf").exists()
    first = run("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE, "--json")
    assert first.code == 3 and "1 of 3 checkpoints were not converted: run/iter_30.pth" in first.stderr
    states = [(one["source"], one["state"], one["exit_code"]) for one in first.report["checkpoints"]]
    assert states == [
        ("run/iter_2.pth", "converted", 0),
        ("run/iter_10.pth", "converted", 0),
        ("run/iter_30.pth", "not complete", 3),
    ]
    llava_convert.convert("run/iter_2.pth", to="hf", out="alone", llm=TINY / "llm", visual_encoder=TINY / "vit",
                          max_shard_size="100kB")  # fmt: skip
    assert weights_in(Path("hf/iter_2")) == weights_in(Path("alone"))
    before = tree(Path("hf"))
    step(Path("run"), 30)  # it is whole now
    again = run("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE)
    assert again.code == 0 and again.stdout.count("there already") == 2 and again.stdout.count("converted") == 1
    after = tree(Path("hf"))
    assert before.items() - after.items() <= {(sweep.LEDGER, before[sweep.LEDGER])}
    shutil.rmtree("hf/iter_10")
    assert run("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE).stdout.count("converted") == 1
    assert tree(Path("hf/iter_10")) == {
        n.removeprefix("iter_10/"): h for n, h in after.items() if n.startswith("iter_10/")
    }


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    step(Path("run"), 1)
    for state in ("converted", "there already"):
        ran = run("sweep", "run/*", "-o", "~/hf/{name}", *MORE)
        assert ran.code == 0 and state in ran.stdout, ran.stderr
    assert sorted(path.name for path in Path("home/hf").iterdir()) == [sweep.LEDGER, "iter_1"]
    assert not Path("~").exists()


def test_a_checkpoint_that_was_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its old output is in the way: that is said, and nothing is replaced without --force."""
    monkeypatch.chdir(tmp_path)
    step(Path("run"), 1)
    assert run("sweep", "run/*", "-o", "hf/{name}", *MORE).code == 0
    before = tree(Path("hf"))
    step(Path("run"), 1, projector=2.0)
    ran = run("sweep", "run/*", "-o", "hf/{name}", *MORE)
    assert ran.code == 6 and "exists" in ran.stderr and tree(Path("hf")) == before
    assert run("sweep", "run/*", "-o", "hf/{name}", *MORE, "--force").code == 0
    assert tree(Path("hf/iter_1")) != {n.removeprefix("iter_1/"): h for n, h in before.items()}


def test_files_that_come_out_as_before_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model and the tower are those of the bases: of the second step the projector alone is new."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        path = step(Path("run"), number, projector=float(number))
        llava_convert.convert(path, to="hf", out=f"alone/{path.stem}", llm=TINY / "llm", visual_encoder=TINY / "vit",
                              max_shard_size="100kB")  # fmt: skip
    planned: list[str] = []

    def make_plan(target: Target, *, tags: Mapping[str, object]) -> Plan:
        planned.append(str(tags["to"]))
        return planning_of(target, tags=tags)

    planning_of = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", make_plan)
    ran = run("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE, "--json", "--verify", "full")
    assert ran.code == 0, ran.stderr
    assert planned == ["hf", "hf"], "each is planned once"
    copied = [one["copied"] for one in ran.report["checkpoints"]]
    assert copied[0] == 0 and copied[1] > 1
    for number in (1, 2):
        assert weights_in(Path(f"hf/iter_{number}")) == weights_in(Path(f"alone/iter_{number}"))
    assert weights_in(Path("hf/iter_1")) != weights_in(Path("hf/iter_2"))
    step(Path("run"), 4, projector=4.0)
    ran = run("sweep", "run/iter_4.pth", "-o", "hf/{name}", *MORE, "--json", "--digest")
    assert ran.code == 0 and ran.report["checkpoints"][0]["copied"] == 0, "those of tensors are made by who reads them"
    # one that somebody touched since is not believed
    shard = next(Path("hf/iter_1").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    for other in (shard, Path("hf/iter_2") / shard.name):
        other.write_bytes(data)
    step(Path("run"), 3, projector=3.0)
    assert run("sweep", "run/iter_3.pth", "-o", "hf/{name}", *MORE).code == 0
    assert run("verify", "run/iter_3.pth", "hf/iter_3", *BASES).code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-o", "hf"), "ends in {name}"),
        ((), "ends in {name}"),
        (("-o", "{name}/hf"), "ends in {name}"),
        (("-o", "hf/{name}", "--files", "1/2"), "--files does not apply to a sweep"),
        (("-o", "hf/{name}", "--push", "me/x"), "do not apply to a sweep"),
        (("-o", "hf/{name}", "--watch", "0"), "a number of seconds"),
    ],
)
def test_what_makes_no_sense(more: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("sweep", "run/*", "--to", "hf", *more)
    assert ran.code == 2 and said in ran.stderr, ran.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_and_no_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("sweep", "run/*", "--to", "hf", "-o", "hf/{name}")
    assert ran.code == 3 and "no file matches" in ran.stderr
    Path("hf").mkdir()
    Path("hf", sweep.LEDGER).write_text("[]")
    step(Path("run"), 1)
    ran = run("sweep", "run/*", "-o", "hf/{name}", *MORE)
    assert ran.code == 3 and "is not a ledger of a sweep" in ran.stderr


def test_a_network_that_fails_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source out of reach may be there at the next look, so that --watch does not give it up."""
    monkeypatch.chdir(tmp_path)
    step(Path("run"), 1)

    def refused(*_: object) -> None:
        raise HubError("the network is gone")

    monkeypatch.setattr(sweep, "prepared", refused)
    ran = run("sweep", "run/*", "-o", "hf/{name}", *MORE, "--json")
    assert ran.code == 8 and [one["state"] for one in ran.report["checkpoints"]] == ["not complete"]


@pytest.mark.slow
def test_while_they_arrive_and_after_a_kill(tmp_path: Path) -> None:
    step(tmp_path / "run", 1)
    arguments = ("sweep", "run/iter_*.pth", "-o", "hf/{name}", *MORE, "--watch", "1")
    for number, end in ((1, signal.SIGKILL), (2, signal.SIGINT)):
        step(tmp_path / "run", number)
        running = start(*arguments, cwd=tmp_path)
        ledger = tmp_path / "hf" / sweep.LEDGER
        deadline = time.monotonic() + 60
        while not (ledger.exists() and f"iter_{number}" in json.loads(ledger.read_text())["done"]):
            assert running.poll() is None and time.monotonic() < deadline, running.communicate()
            time.sleep(0.1)
        running.send_signal(end)
        _, said = running.communicate(timeout=60)
        assert running.returncode == (130 if end == signal.SIGINT else -end), said
    assert "interrupted; 1 converted, 1 there already" in said
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [sweep.LEDGER, "iter_1", "iter_2"]


@pytest.mark.slow
def test_in_a_store(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        s3.put(layouts["official"], f"runs/{name}")
    arguments = ("sweep", "s3://models/runs/step-*", "--to", "hf", "-o", "s3://models/out/{name}", "--json")
    ran = s3.run(tmp_path, *arguments)
    assert ran.code == 0, ran.stderr
    assert [one["state"] for one in ran.report["checkpoints"]] == ["converted"] * 2
    assert read_back(s3, "out/step-1") == read_back(s3, "out/step-2") != {}
    again = s3.run(tmp_path, *arguments)
    assert [one["state"] for one in again.report["checkpoints"]] == ["there already"] * 2, again.stderr


@pytest.mark.slow
def test_files_that_come_out_as_before_are_copied_by_the_store(s3: Store, tmp_path: Path) -> None:
    """No byte of them is sent again: of the second step only the shards with the projector are."""
    for number in (1, 2):
        step(tmp_path / "run", number, projector=float(number))
    arguments = ("-o", "s3://models/out/{name}", *MORE, "--json", "--verify", "full")
    sent: list[int] = []
    copied: list[int] = []
    for number in (1, 2):
        log = tmp_path / f"requests-{number}"
        ran = s3.run(tmp_path, "sweep", f"run/iter_{number}.pth", *arguments, code=COUNTS, COUNTS=str(log))
        assert ran.code == 0, ran.stderr
        requests = [line.split() for line in log.read_text().splitlines()]
        sent.append(sum(int(size) for _, size in requests))
        copied.append([method for method, _ in requests].count("copy_object"))
        assert s3.run(tmp_path, "verify", f"run/iter_{number}.pth", f"s3://models/out/iter_{number}", *BASES).code == 0
    one, two = (read_back(s3, f"out/iter_{number}") for number in (1, 2))
    same = {name: len(data) for name, data in two.items() if name.endswith(".safetensors") and one[name] == data}
    assert copied == [0, len(same)] == [0, 3]
    assert ran.report["checkpoints"][0]["copied"] == 3
    assert sent[0] - sent[1] > 0.99 * sum(same.values())
    # one that somebody wrote again since is not believed
    name = min(same)
    s3.client.put_object(Bucket="models", Key=f"out/iter_2/{name}", Body=b"x" * same[name])
    step(tmp_path / "run", 3, projector=3.0)
    ran = s3.run(tmp_path, "sweep", "run/iter_3.pth", *arguments)
    assert ran.code == 0, ran.stderr
    assert s3.run(tmp_path, "verify", "run/iter_3.pth", "s3://models/out/iter_3", *BASES).code == 0
