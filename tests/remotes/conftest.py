"""Models on hubs of this machine, and the command beside them. The hubs' doubles speak to the real clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_convert
from tests.faults.corpus import Ran, shell
from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope

# As `llava-convert`, but without pauses between two tries: what is tried again is the same.
HURRIED = (
    "from llava_convert.storage import remote\nremote.FIRST_PAUSE = 0.0\nfrom llava_convert.cli import main\nmain()\n"
)


@pytest.fixture
def hf() -> Iterator[HuggingFace]:
    with HuggingFace() as hub:
        yield hub


@pytest.fixture
def ms() -> Iterator[ModelScope]:
    with ModelScope() as hub:
        yield hub


@pytest.fixture(scope="session")
def layouts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every layout, by name; the official one in shards."""
    out = tmp_path_factory.mktemp("layouts")
    options = {"llm_id": "org/tiny-llm", "visual_encoder_id": "org/tiny-vit"}
    for name in ("xtuner", "hf", "gguf"):
        llava_convert.convert(tiny / "iter_2.pth", to=name, out=out / name, name="tiny", **options)  # type: ignore[arg-type]
    llava_convert.convert(
        tiny / "iter_2.pth",
        to="official",
        out=out / "official",
        name="tiny",
        max_shard_size="200kB",
        **options,  # type: ignore[arg-type]
    )
    return {name: out / name for name in ("xtuner", "official", "hf", "gguf")}


def command(hub: HuggingFace | ModelScope, cwd: Path, *arguments: str | Path, **more: str) -> Ran:
    """The command line against a hub, in a process of its own: clients read their environment when imported."""
    return shell(*arguments, code=HURRIED, environment={**hub.env, **more}, cwd=cwd)


def weights_in(folder: Path) -> dict[str, bytes]:
    """Every file but the record of where its bytes came from, and the card, which tells of it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("conversion.json", "README.md")
    }
