"""What a hub sends is what it lists: whole files are compared by sha256, and those read in parts are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.corpus import tree
from tests.hubs.loopback import Answer, Request, read, sha256
from tests.hubs.modelscope import ModelScope
from tests.remotes.conftest import Command, Hub


@pytest.fixture(params=["hf", "ms"])
def hub(request: pytest.FixtureRequest, layouts: dict[str, Path]) -> Hub:
    found: Hub = request.getfixturevalue(request.param)
    found.add("org/tiny", layouts["official"])
    return found


def address(hub: Hub) -> str:
    return f"{'ms' if isinstance(hub, ModelScope) else 'hf'}://org/tiny"


def other(data: bytes) -> bytes:
    """As long, and another at its end."""
    return data[:-8] + bytes(8 * [data[-1] ^ 1])


def spoil(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub list a file as it is, and send another of its size."""
    usual, data, served = hub.answer, read(path), (f"/{path.name}", f"/cdn/{sha256(path)}", f"/oss/{sha256(path)}")

    def answer(request: Request) -> Answer:
        found = usual(request)
        named = request.path.endswith(served) or request.query.get("FilePath") == path.name
        if request.method == "GET" and named and found.status == 200 and read(found.body) == data:
            return Answer(200, other(data), found.headers, found.ranged)
        return found

    monkeypatch.setattr(hub, "answer", answer)


def cached(hub: Hub, name: str) -> list[str]:
    return [path for path in tree(hub.home) if path.endswith(f"/{name}")]


def test_a_whole_file_of_another_digest(
    command: Command, hub: Hub, layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, and not left in the cache, where the next run would take it for the model's."""
    shard = min(layouts["official"].glob("*.safetensors"))
    with monkeypatch.context() as spoiled:
        spoil(hub, shard, spoiled)
        ran = command("convert", address(hub), "--to", "hf", "-o", "out", "--cache")
    assert ran.code == 8 and shard.name in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr and not (tmp_path / "out").exists()
    assert cached(hub, shard.name) == []
    ran = command("convert", address(hub), "--to", "hf", "-o", "out", "--cache", "--json")
    assert ran.code == 0, ran.stderr
    assert cached(hub, shard.name) and ran.report["unchecked"] == []


def test_a_small_file_of_another_digest_in_place(
    command: Command, ms: ModelScope, layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms.add("org/tiny", layouts["official"])
    spoil(ms, layouts["official"] / "tokenizer.json", monkeypatch)
    ran = command("convert", "ms://org/tiny", "--to", "hf", "-o", "out")
    assert ran.code == 8 and "ms://org/tiny/tokenizer.json" in ran.stderr and "sha256" in ran.stderr, ran.stderr
    assert tree(tmp_path) == {}


def test_what_is_read_in_parts_is_named(command: Command, hub: Hub, layouts: dict[str, Path]) -> None:
    shards = sorted(f"{address(hub)}/{path.name}" for path in layouts["official"].glob("*.safetensors"))
    ran = command("convert", address(hub), "--to", "hf", "-o", "out", "--json")
    assert ran.code == 0, ran.stderr
    assert json.loads(ran.stdout)["unchecked"] == shards
    ran = command("convert", address(hub), "--to", "hf", "-o", "again")
    assert "not compared with the sha256 in the hub's listing" in ran.stderr and shards[0] in ran.stderr
