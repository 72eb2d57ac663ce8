"""A release: every layout in its repository, on both hubs; and a rerun after it was cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Protocol

import pytest

from tests.hubs.conftest import Side, arrived, heal, on_disk
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import Drop, Fault, Request
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Ran, Runner

REPOS = {"org/tiny": "xtuner", "org/tiny-hf": "official", "org/tiny-transformers": "hf", "org/tiny-gguf": "gguf"}


class Release(Protocol):
    def __call__(self, *more: str | Path, source: Path | None = None) -> Ran: ...


@pytest.fixture
def release(runner: Runner, tiny: Path, tmp_path: Path) -> Release:
    def run(*more: str | Path, source: Path | None = None) -> Ran:
        words = ["release", source or tiny / "iter_2.pth", "--name", "org/tiny", "--hub", "both", "-o", tmp_path / "r"]
        return runner(*words, *more, cwd=tiny.parents[1])

    return run


def test_dry_run(release: Release, huggingface: HuggingFace, modelscope: ModelScope, tmp_path: Path) -> None:
    found = release("--dry-run")
    assert found.code == 0, found.said
    assert [line.split()[:2] for line in found.stdout.splitlines()] == [[repo, to] for repo, to in REPOS.items()]
    assert huggingface.requests == [] and modelscope.requests == []
    assert list(tmp_path.iterdir()) == []
    value = release("--dry-run", "--json", "--outtype", "f16,q8_0", "--only", "gguf").json()
    (layout,) = value["layouts"]
    assert value["done"] is False and layout["published"] == []
    assert {"tiny-f16.gguf", "tiny-q8_0.gguf", "tiny-mmproj-f16.gguf"} <= {file["name"] for file in layout["files"]}


def test_both_hubs_and_again(
    release: Release, runner: Runner, huggingface: HuggingFace, modelscope: ModelScope, tmp_path: Path
) -> None:
    """The third push is cut by a kill; the rerun converts and sends what is left, and that is what a dry run told."""
    planned = release("--dry-run", "--json").json()["layouts"]

    def kill(n: int, request: Request) -> Fault | None:
        if request.path == "/api/models/org/tiny-transformers/commit/main":
            os.kill(runner.pid, signal.SIGKILL)
            return Drop()
        return None

    huggingface.fault = kill
    assert release().code == -signal.SIGKILL
    heal(huggingface)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*") if p.is_file()}
    found = release("--json")
    assert found.code == 0, found.said
    for plan, (repo, to) in zip(planned, REPOS.items(), strict=True):
        folder = tmp_path / "r" / repo.removeprefix("org/")
        assert (plan["repo"], plan["layout"]) == (repo, to)
        assert [file["name"] for file in plan["files"]] == sorted(on_disk(folder))
        arrived(Side("huggingface", huggingface, "main"), repo, folder)
        arrived(Side("modelscope", modelscope, "master"), repo, folder)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was converted twice
    told = found.json()["layouts"]
    assert [one["conversion"] for one in told] == ["there already", "there already", "there already", "convert"]
    assert [p["skipped"] == p["count"] for one in told[:2] for p in one["published"]] == [True] * 4
    # What has been changed since is made again.
    config = tmp_path / "r" / "tiny-gguf" / "tiny-f16.gguf"
    whole = config.read_bytes()
    config.write_bytes(whole[:-1] + b"\x01")
    assert release("--only", "gguf").code == 0
    assert config.read_bytes() == whole


def test_what_is_there_already(release: Release, tmp_path: Path, huggingface: HuggingFace) -> None:
    (tmp_path / "r" / "tiny-hf").mkdir(parents=True)
    found = release()
    assert found.code == 6 and "tiny-hf" in found.stderr and "--only xtuner,hf,gguf" in found.stderr
    assert huggingface.requests == [] and list((tmp_path / "r").iterdir()) == [tmp_path / "r" / "tiny-hf"]


def test_a_source_in_one_of_the_layouts(release: Release, outputs: dict[str, Path], modelscope: ModelScope) -> None:
    found = release("--only", "official", "--json", source=outputs["official"])
    assert found.code == 0, found.said
    (told,) = found.json()["layouts"]
    assert (told["conversion"], told["repo"]) == ("as it is", "org/tiny-hf")
    arrived(Side("modelscope", modelscope, "master"), "org/tiny-hf", outputs["official"])


def test_stage_one(release: Release, tiny: Path, huggingface: HuggingFace, tmp_path: Path) -> None:
    """The projector of stage 1 has a repository of its own; here the same file stands for that checkpoint."""
    found = release("--only", "pretrain", "--pretrained-pth", tiny / "iter_2.pth")
    assert found.code == 0, found.said
    files = set(Side("huggingface", huggingface, "main").files("org/tiny-pretrain"))
    assert "projector/model.safetensors" in files and "model.safetensors" not in files
    assert release("--only", "pretrain").code == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--only", "pdf"], "--only pdf"), (["--name", "tiny"], "ORG/NAME"), (["--hub", "x"], "--hub x")],
)
def test_usage(release: Release, more: list[str], message: str, tmp_path: Path) -> None:
    found = release(*more)
    assert found.code == 2 and message in found.stderr
    assert list(tmp_path.iterdir()) == []
