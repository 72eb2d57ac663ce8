"""Models on hubs of this machine, and the command beside them. The hubs' doubles speak to the real clients."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

import llava_convert
from tests.faults.corpus import Ran, shell
from tests.hubs.conftest import empty
from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Runner

if TYPE_CHECKING:
    from tests.remotes.s3 import Store

# As `llava-convert`, but without pauses between two tries: what is tried again is the same.
HURRIED = "from llava_convert.core import retry\nretry.FIRST_PAUSE = 0.0\nfrom llava_convert.cli import main\nmain()\n"
# What the clients read once, when they are imported: a run with another value has to be a process of its own.
_READ_ONCE = {"HF_ENDPOINT", "HF_HUB_OFFLINE", "PYTHONPATH", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"}

Hub = HuggingFace | ModelScope


class Command(Protocol):
    """The command line beside the hubs, in a process of its own, with more of an environment."""

    def __call__(self, *arguments: str | Path, **environment: str) -> Ran: ...


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from tests.remotes.s3 import served  # moto takes seconds to import, and most tests need none

    with served() as url:
        yield url


@pytest.fixture
def s3(endpoint: str) -> Store:
    from tests.remotes.s3 import bucket

    return bucket(endpoint)


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[HuggingFace, ModelScope]]:
    with HuggingFace() as huggingface, ModelScope() as modelscope:
        yield huggingface, modelscope


@pytest.fixture
def hf(_servers: tuple[HuggingFace, ModelScope]) -> HuggingFace:
    empty(_servers[0])
    shutil.rmtree(_servers[0].home / "hub", ignore_errors=True)  # the client's cache
    return _servers[0]


@pytest.fixture
def ms(_servers: tuple[HuggingFace, ModelScope]) -> ModelScope:
    empty(_servers[1])
    shutil.rmtree(_servers[1].home / "cache", ignore_errors=True)
    return _servers[1]


@pytest.fixture(scope="session")
def _runner(_servers: tuple[HuggingFace, ModelScope]) -> Iterator[Runner]:
    with Runner(_servers[0].env | _servers[1].env) as run:
        yield run


@pytest.fixture
def command(_servers: tuple[HuggingFace, ModelScope], _runner: Runner, tmp_path: Path) -> Command:
    def run(*arguments: str | Path, **environment: str) -> Ran:
        if _READ_ONCE & environment.keys():
            servers = _servers[0].env | _servers[1].env
            return shell(*arguments, code=HURRIED, environment={**servers, **environment}, cwd=tmp_path)
        found = _runner(*arguments, cwd=tmp_path, **environment)
        return Ran(found.code, found.stdout, found.stderr)

    return run


@pytest.fixture(scope="session")
def layouts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every layout, by name; the official one in shards."""
    out = tmp_path_factory.mktemp("layouts")
    for name, limit in (("xtuner", None), ("hf", None), ("gguf", None), ("official", "200kB")):
        llava_convert.convert(
            tiny / "iter_2.pth",
            to=name,
            out=out / name,
            name="tiny",
            max_shard_size=limit,
            llm_id="org/tiny-llm",
            visual_encoder_id="org/tiny-vit",
        )
    return {name: out / name for name in ("xtuner", "official", "hf", "gguf")}


def weights_in(folder: Path) -> dict[str, bytes]:
    """Every file but the record of where its bytes came from, and the card, which tells of it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("conversion.json", "README.md")
    }
