"""An output that several runs write together, each its share of the files: the bytes of one run, whoever is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_convert.core.errors import InputError, Interrupted, MismatchError, OutputError
from llava_convert.engine.plan import Plan
from llava_convert.engine.run import Outcome
from llava_convert.engine.shards import Shard
from llava_convert.ops.base import CastLoss
from llava_convert.storage.output.remote_staging import RemoteStaging
from llava_convert.storage.output.shared import SharedStaging
from llava_convert.storage.output.staging import RECORD, Staging
from llava_convert.storage.ranges import write_all
from tests.faults.corpus import TINY, Corpus, accepted, assert_clean, run, tree
from tests.faults.system_calls import shimmed
from tests.hubs.runner import Runner

FILES = {"a.safetensors": b"A" * 3000, "sub/b.safetensors": b"B" * 5000, "c.safetensors": b"C" * 2_000_000}
SEED = 22
KILLS, ALL_KILLS = 12, 200


def share(out: Path, *names: str, plan: str = "plan", said: list[str] | None = None) -> SharedStaging:
    say = [].append if said is None else said.append
    return SharedStaging(out, plan, names, force=False, needed_bytes=0, say=say)


def whole(out: Path, plan: str = "plan") -> Staging:
    return Staging(out, plan, force=False, resume=True, needed_bytes=0, say=[].append, needs=tuple(FILES))


def write(stage: Staging, *names: str) -> None:
    for name in names:
        if not stage.finished(name):
            with stage.new_file(name, len(FILES[name])) as fd:
                write_all(fd, 0, FILES[name])


def finish(out: Path) -> None:
    with whole(out) as stage:
        stage.commit()
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == sorted(FILES)
    assert_clean(out.parent)


# --- the folder that they share


def test_two_at_once_and_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with share(out, "a.safetensors") as one, share(out, "sub/b.safetensors", "c.safetensors") as other:
        write(other, "sub/b.safetensors", "c.safetensors")
        other.tell("c.safetensors", {"verified": "full"})
        with pytest.raises(OutputError, match="in use by another process"), whole(out):
            pass
        write(one, "a.safetensors")
        other.settle()
    with whole(out) as stage:
        assert stage.found["c.safetensors"] == {"verified": "full"} and not stage.found["a.safetensors"]
    finish(out)


def test_doubled(tmp_path: Path) -> None:
    """Both write the same file at once: it is whole at each moment, and counts once."""
    out = tmp_path / "out"
    with share(out, *FILES) as one, share(out, *FILES) as other:
        with one.new_file("a.safetensors", 3000) as first, other.new_file("a.safetensors", 3000) as second:
            write_all(first, 0, FILES["a.safetensors"][:1000])
            write_all(second, 0, FILES["a.safetensors"])
            write_all(first, 1000, FILES["a.safetensors"][1000:])
        write(one, *FILES)
        write(other, *FILES)
    said: list[str] = []
    with share(out, *FILES, said=said) as third:
        assert all(map(third.finished, FILES))
    assert said == ["3 of its files are there already, 2,008,000 bytes"]
    finish(out)


@pytest.mark.parametrize("why", ["an error", "Ctrl-C"])
def test_what_is_finished_stays(tmp_path: Path, why: str) -> None:
    out = tmp_path / "out"
    problem = InputError("it changed") if why == "an error" else KeyboardInterrupt()
    with pytest.raises(InputError if why == "an error" else Interrupted) as told, share(out, *FILES) as stage:
        write(stage, "c.safetensors")
        with stage.new_file("a.safetensors", 3000) as fd:
            write_all(fd, 0, b"half")
            raise problem
    assert why == "an error" or "finished stay in" in str(told.value)
    left = tree(tmp_path / ".out.partial")
    assert "c.safetensors" in left and not [name for name in left if ".unfinished" in name]
    with share(out, *FILES) as again:
        assert again.finished("c.safetensors") and not again.finished("a.safetensors")
        write(again, *FILES)
    finish(out)


def test_a_share_is_missing(tmp_path: Path) -> None:
    """Nothing that others wrote is lost by the attempt to finish too early, with a folder or without."""
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="3 of 3 files are not there yet"), whole(out):
        pass
    with share(out, "c.safetensors") as stage:
        write(stage, "c.safetensors")
    with pytest.raises(OutputError, match=r"2 of 3 files are not there yet: a\.safetensors") as told, whole(out):
        pass
    assert "--resume in place of --finish" in str(told.value.hint)
    with share(out, *FILES) as stage:
        assert stage.finished("c.safetensors")
        write(stage, *FILES)
    with pytest.raises(MismatchError), whole(out):  # and one that fails later leaves all of it
        raise MismatchError("wrong")
    finish(out)


def test_another_plan(tmp_path: Path) -> None:
    """A source that changed between two shares: the second is refused, and so is the end of the changed one."""
    out = tmp_path / "out"
    with share(out, *FILES) as stage:
        write(stage, *FILES)
    before = tree(tmp_path / ".out.partial")
    with pytest.raises(OutputError, match="files of another plan"), share(out, "a.safetensors", plan="other"):
        pass
    with pytest.raises(OutputError, match="files of another plan"), whole(out, "other"):
        pass
    assert tree(tmp_path / ".out.partial") == before
    finish(out)


def test_two_plans_begin_at_one_moment(tmp_path: Path) -> None:
    """Neither sees the other's record when it enters; who writes its own later does."""
    out = tmp_path / "out"
    with share(out, "a.safetensors"):
        late = share(out, "a.safetensors", plan="other")
        late._take_leftover = lambda: None  # type: ignore[method-assign]
        with pytest.raises(OutputError, match="files of another plan"), late:
            pass


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "gone", "torn record"])
def test_only_what_a_record_vouches_for_counts(tmp_path: Path, damage: str) -> None:
    out, folder = tmp_path / "out", tmp_path / ".out.partial"
    with share(out, *FILES) as stage:
        write(stage, *FILES)
    path = folder / "c.safetensors"
    if damage == "other bytes":
        path.write_bytes(b"x" * 2_000_000)
    elif damage == "shorter":
        os.truncate(path, 5)
    elif damage == "gone":
        path.unlink()
    else:
        record = next(folder.glob(f"{RECORD}-*"))
        os.truncate(record, record.stat().st_size - 1)
    with pytest.raises(OutputError, match=r"1 of 3 files are not there yet: c\.safetensors"), whole(out):
        pass


def test_what_is_no_folder_of_ours(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="another plan"), share(tmp_path / "out", "a.safetensors"):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_share_never_commits(tmp_path: Path) -> None:
    with share(tmp_path / "out", "a.safetensors") as stage, pytest.raises(RuntimeError):
        stage.commit()


def test_a_record_that_grows_between_the_listing_and_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store a share writes its record anew after each file, while another one looks at what is there."""
    url = "memory://shares/out"

    def stage(*names: str) -> RemoteStaging:
        return RemoteStaging(url, "plan", force=False, resume=False, needed_bytes=0, say=[].append, share=names)

    listing = RemoteStaging._listing
    with stage("a.safetensors") as one:
        with one.new_file("a.safetensors", 3000) as fd:
            write_all(fd, 0, FILES["a.safetensors"])
        older = {name: 20 if name.startswith(RECORD) else size for name, size in listing(one).items()}
        monkeypatch.setattr(RemoteStaging, "_listing", lambda self: older)
        with stage("a.safetensors") as other:
            assert other.finished("a.safetensors")
            monkeypatch.setattr(RemoteStaging, "_listing", listing)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_into_one_place_in_a_store(resume: bool) -> None:
    """A store has no locks: who begins later has it, and the other one stops and removes nothing of it."""
    url = f"memory://twice/{resume}"
    later = RemoteStaging(url, "plan", force=False, resume=resume, needed_bytes=0, say=[].append)
    earlier = RemoteStaging(url, "plan", force=False, resume=False, needed_bytes=0, say=[].append)
    with pytest.raises(OutputError, match="in use by another run"), earlier:
        write_there(earlier, "a.safetensors")
        with later:
            assert later.finished("a.safetensors") is resume
            with pytest.raises(OutputError, match="in use by another run"):
                write_there(earlier, "c.safetensors")
            write_there(later, *FILES)
            later.commit()
        with pytest.raises(OutputError, match="in use by another run"):
            earlier.commit()
        write_there(earlier, "sub/b.safetensors")
    assert {name: later._fs.cat_file(later._at(name)) for name in later._listing()} == FILES


def write_there(stage: RemoteStaging, *names: str) -> None:
    for name in names:
        if not stage.finished(name):
            with stage.new_file(name, len(FILES[name])) as fd:
                write_all(fd, 0, FILES[name])


# --- who writes what


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=60), st.integers(1, 70))
def test_shares_are_a_partition(sizes: list[int], count: int) -> None:
    shards = tuple(Shard(f"{i:03}", b"", size, ()) for i, size in enumerate(sizes))
    plan = Plan("hf", shards, {}, {})
    shares = [plan.share(number, count) for number in range(1, count + 1)]
    assert sorted(one.name for share in shares for one in share) == [one.name for one in shards]
    loads = [sum(one.size for one in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_what_a_run_found_of_a_shard_comes_back() -> None:
    outcome = Outcome()
    outcome.losses["a", "x"], outcome.losses["b", "x"] = CastLoss(0, 3, 2), CastLoss(0, 1, 0)
    outcome.losses["a", "y"] = CastLoss()
    outcome.digests["a", "x"] = "00ff"
    again = Outcome()
    again.take("a", outcome.of("a"))
    assert again.losses == {("a", "x"): CastLoss(0, 3, 2)} and again.digests == {("a", "x"): "00ff"}
    assert again.flushed == 3 and again.nonfinite == {"x": 2} and outcome.flushed == 4


# --- the command


def job(source: Path, out: Path, to: str, *more: str) -> tuple[str | Path, ...]:
    return ("convert", source, "--to", to, "-o", out, "--visual-encoder", TINY / "vit", "--name", "tiny", *more)


@pytest.mark.parametrize(
    ("layout", "to", "more"),
    [
        ("official", "hf", ("--max-shard-size", "100kB")),
        ("official", "hf", ("--max-shard-size", "100kB", "--digest", "--verify", "full", "--dtype", "bfloat16")),
        ("xtuner", "official", ("--max-shard-size", "100kB")),
        ("official", "xtuner", ("--max-shard-size", "100kB")),
        ("official", "gguf", ("--outtype", "f16,q8_0", "--digest", "--verify", "full")),
    ],
    ids=["hf", "hf, digests, in full", "official", "xtuner", "gguf"],
)
def test_the_bytes_of_one_run(corpus: Corpus, tmp_path: Path, layout: str, to: str, more: tuple[str, ...]) -> None:
    arguments = job(corpus.layouts[layout], tmp_path / "out", to, *more)
    if layout == "official" and to in ("xtuner", "gguf"):
        arguments = tuple(a for a in arguments if a not in ("--visual-encoder", TINY / "vit"))
    alone = accepted(*arguments, "--json")
    wanted = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    written = []
    for number in (3, 1, 2):
        ran = accepted(*arguments, "--files", f"{number}/3", "--json").report
        assert ran["done"] is False and ran["files"] == alone.report["files"]
        written += ran["share"]
    assert sorted(written) == sorted(one["name"] for one in alone.report["files"] if one["tensors"] is not None)
    ran = accepted(*arguments, "--finish", "--json")
    assert ran.report["done"] is True and ran.report["share"] is None
    assert tree(tmp_path / "out") == wanted
    assert_clean(tmp_path)


def test_resume_makes_what_is_missing(corpus: Corpus, tmp_path: Path) -> None:
    arguments = job(corpus.layouts["official"], tmp_path / "out", "hf", "--max-shard-size", "100kB")
    accepted(*arguments)
    wanted = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    accepted(*arguments, "--files", "1/2")
    early = run(*arguments, "--finish")
    assert early.code == 6 and "files are not there yet" in early.stderr, early.stderr
    ran = accepted(*arguments, "--resume")
    assert "finished files kept" in ran.stderr
    assert tree(tmp_path / "out") == wanted


def test_a_source_that_changed_between_two_shares(corpus: Corpus, tmp_path: Path) -> None:
    source = Path(shutil.copytree(corpus.layouts["official"], tmp_path / "source"))
    arguments = job(source, tmp_path / "out", "hf", "--max-shard-size", "100kB")
    accepted(*arguments, "--files", "1/2")
    weights = sorted(source.glob("*.safetensors"))[-1]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # the same header, the same size
    for more in (("--files", "2/2"), ("--finish",)):
        ran = run(*arguments, *more)
        assert ran.code == 6 and "files of another plan" in ran.stderr, ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--files", "4/3"), "give a share and the number of shares"),
        (("--files", "0/3"), "give a share and the number of shares"),
        (("--files", "half"), "give a share and the number of shares"),
        (("--files", "1/3", "--finish"), "--finish does not apply to a share"),
        (("--files", "1/3", "--resume"), "--resume does not apply to a share"),
        (("--files", "1/3", "--push", "me/model"), "--push does not apply to a share"),
        (("--finish", "--resume"), "do not go together"),
        (("--files", "1/3", "--executor", "dask://local"), "--files does not apply with --executor"),
        (("--executor", "localhost:8786"), "give dask://HOST:PORT"),
        (("--executor", "dask://local?workers=none"), "with N 1 or more"),
    ],
)
def test_what_makes_no_sense(corpus: Corpus, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    ran = run(*job(corpus.layouts["official"], tmp_path / "out", "hf"), *more)
    assert ran.code == 2 and len(ran.errors) == 1 and said in ran.errors[0], ran.stderr
    assert not list(tmp_path.iterdir())


# --- workers that are lost


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with shimmed() as made:
        yield made


@pytest.mark.parametrize(
    "kills", [pytest.param(KILLS, marks=pytest.mark.slow), pytest.param(ALL_KILLS, marks=pytest.mark.sweep)]
)
def test_workers_are_killed(runner: Runner, corpus: Corpus, tmp_path: Path, kills: int) -> None:
    """At a call chosen at random, a share or the end of it: run again, all of it is there once, with the same bytes."""
    arguments = job(corpus.layouts["official"], tmp_path / "out", "hf", "--max-shard-size", "50kB", "--threads", "1")
    accepted(*arguments)
    wanted = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    chance, killed = random.Random(SEED), 0
    fault = {"FAULT_PATHS": str(tmp_path), "FAULT_SIGNAL": str(int(signal.SIGKILL))}
    fault["FAULT_OPS"] = ",create,write,copy,truncate,sync,rename,mkdir,unlink,rmdir,"
    while killed < kills:
        waiting = [("--files", "1/3"), ("--files", "2/3"), ("--files", "3/3"), ("--finish",)]
        while waiting:
            most = 40 if killed < kills else 0
            ran = runner(*arguments, *waiting[0], **fault, FAULT_AT=str(chance.randint(1, most) if most else 0))
            if ran.code == -signal.SIGKILL:
                killed += 1
                if (tmp_path / "out").exists():
                    break
                continue
            assert ran.code == 0, ran.stderr
            waiting.pop(0)
        assert tree(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
