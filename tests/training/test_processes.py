"""Training in processes of its own: several of them, killed ones, and disks that are full."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.resources import training
from tests.training.drawn import draw, recipe
from tests.training.programs import command, environment, furthest, losses, train, typically

checkpoint = training("checkpoint")
HERE = Path(__file__).parent


def cut_back(whole: Path, cut: Path, iteration: int) -> None:
    """A copy of a work_dir as it was after an iteration."""
    shutil.copytree(whole, cut)
    for late in checkpoint.checkpoints(cut):
        if int(late.stem.removeprefix("iter_")) > iteration:
            shutil.rmtree(late) if late.is_dir() else late.unlink()


def test_two_processes_are_one_with_the_double_batch(tiny: Path, tmp_path: Path) -> None:
    """A mean over two processes is of their means, so all answers here have as many tokens.

    With and without sharding by FSDP; taken up again, too. Losses to 2e-6 relative, weights to 1e-8 in the mean, and to
    a hundredth of one step at most: where a gradient is nearly nothing, AdamW makes a step of rounding (1e-6 on one
    type of CPU, 3e-6 on another).
    """
    data = draw(tmp_path / "data", alike=AutoTokenizer.from_pretrained(tiny / "llm"))
    one, two, fsdp, again = (tmp_path / name for name in ("one", "two", "fsdp", "again"))
    last = training("train").train(recipe(tiny, data, "full_vitlora", batch_size=2), one)
    chosen = recipe(tiny, data, "full_vitlora", batch_size=1)
    train(chosen, two, processes=2)
    assert losses(two) == pytest.approx(losses(one), rel=2e-6)
    assert furthest(last, two / "iter_4.pth") < 5e-6 and typically(last, two / "iter_4.pth") < 1e-8
    assert furthest(last, one / "iter_2.pth") > 1e-4
    train(chosen, fsdp, processes=2, program=HERE / "fsdp_on_cpu.py")
    assert losses(fsdp) == pytest.approx(losses(one), rel=2e-6)
    assert furthest(last, fsdp / "iter_4.pth") < 5e-6 and typically(last, fsdp / "iter_4.pth") < 1e-8
    cut_back(fsdp, again, 2)
    train(chosen, again, "--resume", processes=2, program=HERE / "fsdp_on_cpu.py")
    assert furthest(last, again / "iter_4.pth") < 5e-6 and typically(last, again / "iter_4.pth") < 1e-8
    with pytest.raises(UsageError, match="of a run of 2 processes, this one has 1"):
        training("train").train(chosen, two, resume=True)


def test_stages_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    """One after the other in the same processes, in other precisions; the second starts from the first."""
    recipes = training("recipe")
    text = recipes.as_toml(recipe(tiny, draw(tmp_path / "data"), "full_vitlora", batch_size=1))
    (tmp_path / "two.toml").write_text(
        text + '[[stage]]\nname = "first"\n[stage.train]\ndtype = "bf16"\n[[stage]]\nname = "second"\n'
    )
    words = ["-m", "llava_convert", "train", "two.toml", "--work-dir", "w"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, *words], env=environment(), cwd=tmp_path, check=True)
    assert len(losses(tmp_path / "w/first")) == len(losses(tmp_path / "w/second")) == 4
    assert losses(tmp_path / "w/second")[0] < losses(tmp_path / "w/first")[0] - 0.1


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_taken_up(tiny: Path, tmp_path: Path, processes: int) -> None:
    """SIGKILL in mid-run; the same command with --resume ends with the same bits."""
    chosen = recipe(
        tiny, draw(tmp_path / "data"), "full_vitlora", model={"visual_encoder_lora": {"r": 4, "dropout": 0.1}},
        batch_size=2 // processes, epochs=6.0, keep=2,
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(chosen, whole, processes=processes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
    words = [sys.executable, *torchrun, *command(chosen, cut)]
    running = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    log = cut / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 5):
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    pointed = Path((cut / "last_checkpoint").read_text())
    assert 4 <= checkpoint.read_checkpoint(pointed).iteration < 24
    train(chosen, cut, "--resume", processes=processes)
    for one in ("iter_22.pth", "iter_24.pth"):
        assert furthest(whole / one, cut / one, every=True) == 0.0
    assert [t["exp_avg"].tolist() for t in checkpoint.read_checkpoint(whole / "iter_24.pth").optimizer.values()] == [
        t["exp_avg"].tolist() for t in checkpoint.read_checkpoint(cut / "iter_24.pth").optimizer.values()
    ]
    assert losses(cut) == losses(whole)


# Killed with half of the third checkpoint written.
HALF = """
import io, os, signal, sys, torch
real, calls = torch.save, []
def save(content, file, **options):
    calls.append(1)
    if len(calls) == 3:
        whole = io.BytesIO()
        real(content, whole, **options)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(content, file, **options)
torch.save = save
from llava_convert.cli import main
sys.exit(main())
"""


def test_killed_while_a_checkpoint_is_written(tiny: Path, tmp_path: Path) -> None:
    chosen = recipe(tiny, draw(tmp_path / "data"), "full_vitlora", epochs=2.0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training("train").train(chosen, whole)
    (tmp_path / "half.py").write_text(HALF)
    killed = train(chosen, cut, program=tmp_path / "half.py", fails=True)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in cut.glob("*iter_*")) == [".iter_6.pth.partial", "iter_2.pth", "iter_4.pth"]
    assert (cut / "last_checkpoint").read_text() == str(cut / "iter_4.pth")
    training("train").train(chosen, cut, resume=True)
    assert furthest(whole / "iter_8.pth", cut / "iter_8.pth") < 1e-6
    assert sorted(p.name for p in cut.glob(".*")) == []


def limited(
    size: int, words: list[str], cwd: Path, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run with files of at most so many bytes: the nearest thing to a full disk that needs no disk."""
    return subprocess.run(
        [python, *words],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    """Exit 6; what was written before is whole, and the run goes on from it when there is room."""
    chosen = recipe(tiny, draw(tmp_path / "data"), "full_vitlora")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training("train").train(chosen, whole)
    cut_back(whole, cut, 2)
    checkpoint.point_at(cut / "iter_2.pth")
    kept = (cut / "iter_2.pth").read_bytes()
    done = limited(len(kept) // 2, command(chosen, cut, "--resume"), tmp_path)
    assert done.returncode == 6, done.stderr
    assert "iter_4.pth cannot be written: File too large" in done.stderr
    assert "the checkpoints before it are whole" in done.stderr
    assert (cut / "iter_2.pth").read_bytes() == kept
    assert (cut / "last_checkpoint").read_text() == str(cut / "iter_2.pth")
    assert [p.name for p in cut.glob("*iter_*")] == ["iter_2.pth"]
    training("train").train(chosen, cut, resume=True)
    assert furthest(whole / "iter_4.pth", cut / "iter_4.pth") < 1e-6


def test_a_small_file_system(tiny: Path, tmp_path: Path) -> None:
    """A real one, which torch's writer meets otherwise than a limit: it fills up in the third checkpoint or the log.

    Whatever room there is, it is exit 6 in a sentence, checkpoints are whole, and nothing partial stays.
    """
    chosen = recipe(tiny, draw(tmp_path / "data"), "full_vitlora", save_steps=1)
    last = training("train").train(chosen, tmp_path / "whole")
    size, disk = last.stat().st_size, tmp_path / "disk"
    disk.mkdir()
    for share in (2.02, 2.5, 2.98):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * share) + 40_000}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            done = train(chosen, disk / "w", fails=True)
            assert done.returncode == 6 and "cannot be written" in done.stderr, done.stderr
            assert "this is a bug" not in done.stderr
            kept = checkpoint.checkpoints(disk / "w")
            assert kept and all(checkpoint.read_checkpoint(path).iteration for path in kept)
            assert Path((disk / "w" / "last_checkpoint").read_text()) == kept[-1]
            assert [p.name for p in (disk / "w").glob(".*")] == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Exit 130, and what is there and how to go on; before the first checkpoint too."""
    chosen = recipe(tiny, draw(tmp_path / "data"), "pretrain", epochs=5000.0, save_steps=2, keep=2)
    words = [sys.executable, *command(chosen, tmp_path / "w")]
    running = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "w").glob("iter_*.pth")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate()
    assert running.returncode == 130, said
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "w")]
    told = [line for line in said.splitlines() if line.startswith("error: interrupted")]
    goes_on = f"the same command with --resume goes on from {kept[-1]}"
    assert told == [f"error: interrupted: {tmp_path / 'w'} holds {', '.join(kept)}; {goes_on}"]
    assert [p.name for p in (tmp_path / "w").glob(".*")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "log.jsonl").symlink_to("/dev/full")
    done = train(recipe(tiny, draw(tmp_path / "data"), "pretrain"), tmp_path / "w", fails=True)
    assert done.returncode == 6 and "log.jsonl cannot be written: No space left on device" in done.stderr


def test_a_picture_that_breaks(tiny: Path, tmp_path: Path) -> None:
    """In mid-run, with several workers: the file and the row are named, and the run goes on when it is whole again."""
    data = draw(tmp_path / "data", 40)
    chosen = recipe(tiny, data, "pretrain", save_steps=1)
    chosen = replace(chosen, data=replace(chosen.data, workers=2))
    bad = data / "7.png"
    bad.rename(data / "away")
    bad.write_bytes((data / "away").read_bytes()[:500])
    with pytest.raises(InputError) as caught:
        training("train").train(chosen, tmp_path / "w")
    assert f"train.json: row 8: picture {bad}: image file is truncated" in caught.value.message
    before = checkpoint.checkpoints(tmp_path / "w")
    assert before
    (data / "away").rename(bad)
    training("train").train(chosen, tmp_path / "w", resume=True)
    assert len(losses(tmp_path / "w")) == 20
    assert len(checkpoint.checkpoints(tmp_path / "w")) == 20 > len(before)
