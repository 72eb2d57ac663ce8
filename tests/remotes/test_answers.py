"""Answers that would fill the memory, compressed or endless: each ends in exit 8, and the process stays small."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from llava_convert.storage.hubs import answers
from tests.faults.corpus import Ran, shell, tree
from tests.hubs.loopback import Answer, Drop, Request
from tests.hubs.modelscope import ModelScope
from tests.remotes.conftest import HURRIED, Hub
from tests.remotes.test_urls import Web

BYTES = 600 << 20  # what a body is once it is unpacked
MOST_MB = 300
# Says at its end how much memory the process took at most.
MEASURED = (
    "import atexit, sys\n"
    "from pathlib import Path\n"
    "def peak():\n"
    "    lines = Path('/proc/self/status').read_text().splitlines()\n"
    "    most = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
    "    sys.stderr.write(f'\\npeak {most >> 10}')\n"
    "atexit.register(peak)\n" + HURRIED
)


def squeezed(window: int) -> bytes:
    """Blanks, as zlib packs them; `window` tells its forms apart. (A block after a full flush can stand anywhere.)"""
    packer, piece = zlib.compressobj(9, zlib.DEFLATED, window), b" " * (1 << 20)
    first = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * (BYTES >> 20) + packer.flush()


def zstd() -> bytes:
    """Blanks by blocks of one repeated byte (RFC 8878, 3.1.1.2)."""
    size, count = 128 << 10, BYTES // (128 << 10)
    head = b"\x28\xb5\x2f\xfd" + b"\x00\x38"  # neither a size nor a checksum; a window of 128 kB
    blocks = [((number == count - 1) | 1 << 1 | size << 3).to_bytes(3, "little") + b" " for number in range(count)]
    return head + b"".join(blocks)


BOMBS = {
    "gzip": lambda: squeezed(31),
    "deflate": lambda: squeezed(15),
    "zstd": zstd,
    "br": lambda: b"\xff" * 1000,  # nothing packs it here; it is refused by its header, as the others are
    "gzip, gzip": lambda: zlib.compress(squeezed(31), 9, 31),
}


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return {name: make() for name, make in BOMBS.items()}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 MB of nothing, which take no room on the disk."""
    path = tmp_path_factory.mktemp("endless") / "body"
    with path.open("wb") as stream:
        stream.truncate(BYTES)
    return path


def bounded(ran: Ran, *fragments: str) -> None:
    assert ran.code == 8, ran.stderr
    assert len(ran.errors) == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert all(fragment in ran.errors[0] for fragment in fragments), ran.stderr
    assert int(ran.stderr.rpartition("peak ")[2]) < MOST_MB, ran.stderr


def address(hub: Hub) -> str:
    return f"{'ms' if isinstance(hub, ModelScope) else 'hf'}://org/tiny"


@pytest.fixture(params=["hf", "ms"])
def hub(request: pytest.FixtureRequest, layouts: dict[str, Path]) -> Hub:
    found: Hub = request.getfixturevalue(request.param)
    found.add("org/tiny", layouts["official"])
    return found


def asked(hub: Hub, *arguments: str | Path, cwd: Path) -> Ran:
    return shell(*arguments, code=MEASURED, environment=hub.env, cwd=cwd, timeout=120)


@pytest.mark.parametrize(("status", "encoding"), [*((200, name) for name in BOMBS), (500, "gzip")])
def test_a_compressed_answer_of_a_hub(
    hub: Hub, bombs: dict[str, bytes], encoding: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    monkeypatch.setattr(hub, "answer", lambda request: Answer(status, bombs[encoding], headers))
    bounded(asked(hub, "inspect", address(hub), cwd=tmp_path), address(hub), "compressed")
    assert all(seen.sent < 8 << 20 for seen in hub.requests)


@pytest.mark.parametrize("way", [[], ["--cache"]], ids=["in place", "cached"])
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"], ids=["config", "weights"])
def test_a_compressed_file_of_a_hub(
    hub: Hub, bombs: dict[str, bytes], way: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = hub.answer

    def answer(request: Request) -> Answer:
        found = usual(request)
        is_file = request.path.endswith(f"/{name}") or "/cdn/" in request.path or "/oss/" in request.path
        if request.method == "GET" and found.status == 200 and (is_file or request.query.get("FilePath") == name):
            return Answer(200, bombs["gzip"], {**found.headers, "Content-Encoding": "gzip"})
        return found

    monkeypatch.setattr(hub, "answer", answer)
    bounded(asked(hub, "convert", address(hub), "--to", "hf", "-o", "out", *way, cwd=tmp_path), address(hub))
    assert tree(tmp_path) == {}


def test_an_endless_answer_of_a_hub(hub: Hub, endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer", lambda request: Answer(200, endless, {"Content-Type": "application/json"}))
    bounded(asked(hub, "inspect", address(hub), cwd=tmp_path), address(hub), "longer than 32 MB")


def test_a_compressed_answer_to_an_upload(
    hub: Hub, bombs: dict[str, bytes], layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "answer", lambda request: Answer(200, bombs["gzip"], {"Content-Encoding": "gzip"}))
    side = "modelscope" if address(hub).startswith("ms") else "huggingface"
    bounded(
        asked(hub, "upload", layouts["gguf"], "org/new", "--hub", side, "--verify", "off", cwd=tmp_path), "compressed"
    )


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br"])
def test_a_compressed_page_of_the_web(
    bombs: dict[str, bytes], layouts: dict[str, Path], encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Web(layouts["official"]) as web:
        headers = {"Content-Type": "text/html", "Content-Encoding": encoding}
        monkeypatch.setattr(web, "answer", lambda request: Answer(200, bombs[encoding], headers))
        ran = shell("inspect", web.url + "/", code=MEASURED, environment=web.env, cwd=tmp_path)
        bounded(ran, web.url, "compressed")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_compressed_file_of_the_web(
    bombs: dict[str, bytes], layouts: dict[str, Path], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Web(layouts["official"]) as web:
        usual = web.answer

        def answer(request: Request) -> Answer:
            found = usual(request)
            if request.path.endswith(suffix) and "Range" in request.headers:
                return Answer(206, bombs["gzip"], {"Content-Encoding": "gzip"})
            return found

        monkeypatch.setattr(web, "answer", answer)
        ran = shell(
            "convert", web.url + "/", "--to", "hf", "-o", "out", code=MEASURED, environment=web.env, cwd=tmp_path
        )
        bounded(ran, web.url)
        assert tree(tmp_path) == {}


def test_an_endless_page_of_the_web(
    endless: Path, layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Web(layouts["official"]) as web:
        monkeypatch.setattr(web, "answer", lambda request: Answer(200, endless, {"Content-Type": "text/html"}))
        ran = shell("inspect", web.url + "/", code=MEASURED, environment=web.env, cwd=tmp_path)
        bounded(ran, web.url, "longer than 32 MB")


@pytest.mark.parametrize("first", ["dropped", "redirected"])
def test_a_compressed_answer_comes_late(
    hub: Hub, bombs: dict[str, bytes], first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a connection that broke, when the client starts anew, and as the body of a redirection."""
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    status, more = (302, {"Location": hub.url + "/elsewhere"}) if first == "redirected" else (200, {})
    hub.fault = lambda number, request: Drop() if number == 0 and first == "dropped" else None
    monkeypatch.setattr(hub, "answer", lambda request: Answer(status, bombs["gzip"], packed | more))
    bounded(asked(hub, "inspect", address(hub), cwd=tmp_path), address(hub), "compressed")


def test_nothing_stays_on_the_libraries() -> None:
    import httpx2
    import requests

    before = requests.Session.send, httpx2.Client.send
    with answers.bounded(), answers.bounded():
        assert requests.Session.send is not before[0] and httpx2.Client.send is not before[1]
    assert (requests.Session.send, httpx2.Client.send) == before


def test_files_may_be_longer_than_answers(hub: Hub, layouts: dict[str, Path], tmp_path: Path) -> None:
    """They go to the disk, or are read in parts."""
    assert any(path.stat().st_size > 100_000 for path in layouts["official"].glob("*.safetensors"))
    small = "from llava_convert.storage.hubs import answers\nanswers.MOST = 100_000\n" + HURRIED
    for way in ([], ["--cache"]):
        arguments = ["convert", address(hub), "--to", "hf", "-o", f"out{len(way)}", *way]
        ran = shell(*arguments, code=small, environment=hub.env, cwd=tmp_path)
        assert ran.code == 0, ran.stderr
