"""Two hubs on this machine, outputs to publish, and a runner that uses the one on the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_convert import convert
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import Loopback, read
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Runner


@dataclass(frozen=True)
class Side:
    """One hub as the tests see it."""

    name: str
    server: HuggingFace | ModelScope
    branch: str

    def files(self, repo: str, revision: str | None = None) -> dict[str, bytes]:
        return {path: read(b) for path, b in self.server.repos[repo].files(revision or self.branch).items()}

    def puts(self) -> list[str]:
        """The large objects, or their parts, that were sent."""
        return [seen.path for seen in self.server.requests if seen.method == "PUT" and seen.status == 200]


@pytest.fixture(scope="session")
def huggingface() -> Iterator[HuggingFace]:
    with HuggingFace() as server:
        yield server


@pytest.fixture(scope="session")
def modelscope() -> Iterator[ModelScope]:
    with ModelScope() as server:
        yield server


@pytest.fixture(scope="session")
def runner(huggingface: HuggingFace, modelscope: ModelScope) -> Iterator[Runner]:
    with Runner(huggingface.env | modelscope.env) as run:
        yield run


@pytest.fixture(autouse=True)
def emptied(huggingface: HuggingFace, modelscope: ModelScope) -> None:
    for server in (huggingface, modelscope):
        empty(server)


def empty(server: HuggingFace | ModelScope) -> None:
    """As new: nothing on it, no fault, no log."""
    server.repos.clear()
    server.objects.clear()
    heal(server)
    if isinstance(server, HuggingFace):
        server.part_bytes = 1 << 40


def heal(server: Loopback) -> None:
    """No fault any more, and the log empty."""
    server.fault = lambda n, request: None
    server.forget()


@pytest.fixture(params=["huggingface", "modelscope"])
def side(request: pytest.FixtureRequest, huggingface: HuggingFace, modelscope: ModelScope) -> Side:
    if request.param == "huggingface":
        return Side("huggingface", huggingface, "main")
    return Side("modelscope", modelscope, "master")


@pytest.fixture(scope="session")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded official output and a GGUF, both verified in full. Not to be changed: `copied` is for that."""
    folder = tmp_path_factory.mktemp("outputs")
    source = tiny / "iter_2.pth"
    convert(source, to="official", out=folder / "tiny-hf", max_shard_size="200kB", verify="full")
    convert(source, to="gguf", out=folder / "tiny-gguf", name="tiny", verify="full")
    assert len(list((folder / "tiny-hf").glob("*.safetensors"))) == 2
    return {"official": folder / "tiny-hf", "gguf": folder / "tiny-gguf"}


@pytest.fixture
def copied(outputs: dict[str, Path], tmp_path: Path) -> Path:
    """The official output, to be changed."""
    return Path(shutil.copytree(outputs["official"], tmp_path / "tiny-hf"))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def arrived(side: Side, repo: str, folder: Path, revision: str | None = None) -> None:
    """Every file of the folder is on the hub, byte for byte, and nothing else but what a new repository has."""
    there, here = side.files(repo, revision), on_disk(folder)
    assert {path: there.get(path) for path in here} == here
    assert set(there) - set(here) <= {".gitattributes"}
