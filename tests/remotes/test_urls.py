"""Sources and targets at URLs: an S3 endpoint (moto's server) and web servers of this machine, by the real clients."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llava_convert
from benchmarks.make import make_official
from benchmarks.measure import CLI, run
from tests.faults.corpus import shell, tree
from tests.hubs.loopback import Answer, Loopback, Request, Status, folder_files
from tests.remotes.conftest import HURRIED, weights_in
from tests.remotes.s3 import SECRET, Store, read_back
from tests.share_folders import cut, write_classic

# --- S3


@pytest.mark.parametrize("to", ["official", "gguf"])
def test_from_s3_to_s3(s3: Store, layouts: dict[str, Path], tmp_path: Path, to: str) -> None:
    s3.put(layouts["hf"], "in/tiny")
    for folder in ("in/tiny/", "out/tiny/"):  # as consoles make them
        s3.client.put_object(Bucket="models", Key=folder, Body=b"")
    arguments = ["--to", to, "--name", "tiny", "--verify", "full"]
    ran = s3.run(tmp_path, "convert", "s3://models/in/tiny", "-o", "s3://models/out/tiny", *arguments)
    assert ran.code == 0, ran.stderr
    assert "s3://models/out/tiny: " in ran.stdout and "every byte checked" in ran.stdout
    local = s3.run(tmp_path, "convert", layouts["hf"], "-o", "local", *arguments)
    assert local.code == 0, local.stderr
    assert read_back(s3, "out/tiny") == weights_in(tmp_path / "local")
    assert s3.objects("out/tiny")["README.md"].decode().startswith("---\n")
    files = json.loads(s3.objects("out/tiny")["conversion.json"])["verified"]["files"]
    assert files == json.loads((tmp_path / "local" / "conversion.json").read_text())["verified"]["files"]
    back = s3.run(tmp_path, "verify", layouts["hf"], "s3://models/out/tiny")
    assert back.code == 0 and "the same" in back.stdout, back.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["local"]


def test_one_shard_is_on_the_disk_at_a_time(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """What the run holds in its temporary folder never exceeds a shard and the small files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    watched = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "most = 0\n"
        "def watch():\n"
        "    global most\n"
        "    while True:\n"
        "        seen = 0\n"
        "        for p in Path(os.environ['TMPDIR']).rglob('*.safetensors'):\n"
        "            try: seen += p.stat().st_blocks * 512\n"
        "            except FileNotFoundError: pass\n"
        "        most = max(most, seen)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "from llava_convert.cli import main\n"
        "try: main()\n"
        "finally: print(most)\n"
    )
    ran = s3.run(
        tmp_path, "convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "150kB",
        "--quiet", code=watched, TMPDIR=str(temporary),
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    shards = {n: len(d) for n, d in s3.objects("out").items() if n.endswith(".safetensors")}
    assert len(shards) >= 3 and 0 < int(ran.stdout) <= max(shards.values()) + 3 * 4096
    assert list(temporary.iterdir()) == []


def test_a_large_file_is_sent_in_little_memory(s3: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make_official(tmp_path / "in", 300_000_000, "F16")
    s3.put(tmp_path / "in", "in")
    words = ["convert", "s3://models/in", "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "1GB"]
    ran = run([*CLI, *words, "--visual-encoder", tmp_path / "in" / "tower"], extra=s3.env, cwd=tmp_path)
    sizes = {o["Key"]: o["Size"] for o in s3.client.list_objects_v2(Bucket="models", Prefix="out/")["Contents"]}
    assert sizes["out/model.safetensors"] > 250_000_000, "one file, far larger than what is sent at a time"
    assert ran.anonymous < 190_000_000, "161 MB; 209 where what was sent is kept"


def test_a_file_in_a_bucket_and_what_lies_beside_it(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    s3.put(layouts["gguf"], "gguf")
    ran = s3.run(tmp_path, "inspect", "s3://models/gguf/tiny-f16.gguf", "--json")
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["source"] == "s3://models/gguf/tiny-f16.gguf"
    assert found["parts"]["visual-encoder"]["tensors"] > 0, "its mmproj lies beside it"


def test_a_distributed_checkpoint_in_a_bucket(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """Its parts are found by few requests, and only the model's bytes are fetched."""
    state = load_file(layouts["hf"] / "model.safetensors")
    parts = {name: (t.shape, cut(t, 0, 2 if len(t) > 1 else 1)) for name, t in state.items()}
    folder = write_classic(tmp_path / "saved" / "pytorch_model_fsdp_0", parts).parent
    for path in layouts["hf"].glob("*"):
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    s3.put(folder, "run/checkpoint-4")
    whole = "s3://models/run/checkpoint-4"
    for source in ([whole], [f"{whole}/pytorch_model_fsdp_0", "--config-from", whole]):
        ran = s3.run(tmp_path, "convert", *source, "--to", "official", "-o", "official", "--force", "--verify", "full")
        assert ran.code == 0, ran.stderr
        assert llava_convert.verify(layouts["hf"], tmp_path / "official")


def test_a_target_that_is_there(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    s3.client.put_object(Bucket="models", Key="out/notes.txt", Body=b"mine")
    ran = s3.run(tmp_path, "convert", layouts["official"], "--to", "hf", "-o", "s3://models/out")
    assert ran.code == 6 and "s3://models/out exists (1 files)" in ran.stderr, ran.stderr
    forced = s3.run(tmp_path, "convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--force")
    assert forced.code == 2 and "the old output would not survive a failure" in forced.stderr
    assert s3.objects() == {"out/notes.txt": b"mine"}


def test_what_cannot_be_reached(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    for address, code, said in [
        ("s3://models/absent", 8, "s3://models/absent: it does not exist"),
        ("s3://no-such-bucket/x", 8, "s3://no-such-bucket/x"),
        ("nonsense://x/y", 2, "the protocol nonsense is not known"),
        ("memory://x/y", 8, "memory://x/y"),
    ]:
        ran = s3.run(tmp_path, "inspect", address)
        assert ran.code == code and said in ran.stderr and len(ran.errors) == 1, (address, ran.stderr)
        assert SECRET not in ran.stderr
    nowhere = s3.run(tmp_path, "inspect", "s3://models/x", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert nowhere.code == 8 and "the connection failed" in nowhere.stderr, nowhere.stderr
    hub = s3.run(tmp_path, "convert", layouts["official"], "--to", "hf", "-o", "hf://org/name")
    assert hub.code == 2 and "--push org/name" in hub.stderr
    cache = s3.run(tmp_path, "inspect", "s3://models/x", "--cache")
    assert cache.code == 2 and "--cache is for models of the hubs" in cache.stderr


@pytest.mark.parametrize(
    ("package", "address", "extra"), [("s3fs", "s3://models/x", "s3"), ("aiohttp", "https://host/x.gguf", "https")]
)
def test_without_the_package(s3: Store, tmp_path: Path, package: str, address: str, extra: str) -> None:
    hidden = tmp_path / "hidden" / package
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError")
    root = Path(llava_convert.__file__).resolve().parents[1]
    ran = s3.run(tmp_path, "inspect", address, PYTHONPATH=f"{tmp_path / 'hidden'}:{root}")
    assert ran.code == 2 and f"pip install 'llava-convert[{extra}]'" in ran.stderr, ran.stderr


# A process that ends, or whose network does, once it has sent so many files.
BREAKS = HURRIED.replace(
    "from llava_convert.cli",
    "import os, signal, sys\n"
    "from llava_convert.core.errors import HubError\n"
    "from llava_convert.storage.output.remote_staging import RemoteStaging\n"
    "left, how = int(os.environ['FILES']), os.environ['HOW']\n"
    "put = RemoteStaging._put\n"
    "def counted(self, local, name):\n"
    "    global left\n"
    "    left -= 1\n"
    "    if left < 0 and how == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    "    if left < 0 and how == 'interrupted': raise KeyboardInterrupt\n"
    "    if left < 0 and how == 'network': raise HubError('the network is gone')\n"
    "    put(self, local, name)\n"
    "RemoteStaging._put = counted\n"
    "from llava_convert.cli",
)


@pytest.mark.parametrize(
    ("how", "files"),
    [
        *(("killed", n) for n in (0, 1, 3, 4, 9, 14, 20, 21, 22)),
        ("network", 3),
        ("network", 12),
        ("interrupted", 3),
        ("interrupted", 14),
    ],
)
def test_a_run_that_breaks_off(s3: Store, layouts: dict[str, Path], tmp_path: Path, how: str, files: int) -> None:
    """After `files` files: never is there what looks whole and is not; the same command with --resume goes on."""
    arguments = ["convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "150kB"]
    ran = s3.run(tmp_path, *arguments, code=BREAKS, FILES=str(files), HOW=how)
    assert ran.code == {"killed": -signal.SIGKILL, "network": 8, "interrupted": 130}[how], ran.stderr
    left = s3.objects("out")
    assert bool(left) == (files > 0 and how != "interrupted")
    if left:
        record = json.loads(left[".llava-convert-plan"])  # as long as it is there, the output is not finished
        shards = {n for n in left if n.endswith(".safetensors")}
        assert set(record["files"]) <= shards and set(left) <= {
            ".llava-convert-plan",
            *record["files"],
            *record["begun"],
        }
        if "config.json" in left:
            assert record["files"].keys() == shards and len(shards) == 3, "nothing loads without it: it comes late"
        if "model.safetensors.index.json" in left:
            assert "config.json" in left
    if how == "interrupted":
        assert left == {}, "an interrupted run takes back what it sent"
    resumed = s3.run(tmp_path, *arguments, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert not left or f"resuming: {len(record['files'])} files are there already" in resumed.stderr
    whole = s3.objects("out")
    assert ".llava-convert-plan" not in whole and "config.json" in whole
    assert s3.run(tmp_path, "verify", layouts["official"], "s3://models/out").code == 0


class Line:
    """A connection to the endpoint that is cut for good once so many bytes were sent over it; a context manager."""

    def __init__(self, endpoint: str, limit: int) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._there, self._left, self._lock = (host, int(port)), limit, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Line:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = 0
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._left <= 0:
                    client.close()
                    continue
                server = socket.create_connection(self._there)
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if counted:
                    with self._lock:
                        self._left -= len(data)
                if self._left <= 0:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("limit", [60_000, 420_000])
def test_the_network_ends_in_the_middle_of_a_file(
    s3: Store, layouts: dict[str, Path], tmp_path: Path, limit: int
) -> None:
    """The real client loses its connection within the first shard, or the last."""
    arguments = ["convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "150kB"]
    with Line(s3.env["AWS_ENDPOINT_URL"], limit) as line:
        ran = s3.run(tmp_path, *arguments, AWS_ENDPOINT_URL=line.url)
    assert ran.code == 8 and len(ran.errors) == 1 and "s3://models/out" in ran.errors[0], ran.stderr
    assert "with --resume goes on from there" in ran.stderr and SECRET not in ran.stderr
    left = s3.objects("out")
    assert "config.json" not in left
    ran = s3.run(tmp_path, *arguments, "--resume")
    finished = len(json.loads(left[".llava-convert-plan"])["files"])
    assert ran.code == 0 and f"resuming: {finished} files are there already" in ran.stderr, ran.stderr
    assert s3.run(tmp_path, "verify", layouts["official"], "s3://models/out").code == 0


def test_a_leftover_without_resume_is_removed_with_a_line(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "150kB"]
    assert s3.run(tmp_path, *arguments, code=BREAKS, FILES="4", HOW="killed").code == -signal.SIGKILL
    ran = s3.run(tmp_path, *arguments)
    assert (
        ran.code == 0 and "removing what an unfinished run left at s3://models/out (--resume would keep" in ran.stderr
    )
    other = [a if a != "150kB" else "100kB" for a in arguments]
    for record in (b"{}", b"[1]", b"\xff", b'{"plan": 1, "files": {"config.json": 3}, "begun": null}'):
        s3.client.put_object(Bucket="models", Key="out/.llava-convert-plan", Body=record)
        before = s3.objects()
        ran = s3.run(tmp_path, *other, "--resume")
        assert ran.code == 6 and "exists" in ran.stderr, "files that no record names are somebody's"
        assert s3.objects() == before


def test_a_difference_found_leaves_nothing(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """A byte that the store changes is found by --verify full, which reads back what was sent."""
    spoiled = HURRIED.replace(
        "from llava_convert.cli",
        "from llava_convert.storage.output.remote_staging import RemoteStaging\n"
        "put = RemoteStaging._put\n"
        "def spoil(self, local, name):\n"
        "    if name.endswith('.safetensors'):\n"
        "        data = bytearray(local.read_bytes()); data[-1] ^= 1; local.write_bytes(data)\n"
        "    put(self, local, name)\n"
        "RemoteStaging._put = spoil\n"
        "from llava_convert.cli",
    )
    arguments = ["convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--verify", "full"]
    ran = s3.run(tmp_path, *arguments, code=spoiled)
    assert ran.code == 7 and s3.objects() == {}, ran.stderr


def test_a_source_that_changes_meanwhile(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    s3.put(layouts["official"], "in")
    meddled = HURRIED.replace(
        "from llava_convert.cli",
        "import boto3\n"
        "from llava_convert.storage.fingerprints import Snapshot\n"
        "recheck = Snapshot.recheck\n"
        "def changed(self):\n"
        "    s3 = boto3.client('s3')\n"
        "    key = next(o['Key'] for o in s3.list_objects_v2(Bucket='models', Prefix='in/model-')['Contents'])\n"
        "    data = s3.get_object(Bucket='models', Key=key)['Body'].read()\n"
        "    s3.put_object(Bucket='models', Key=key, Body=data[:-1] + b'?')\n"
        "    recheck(self)\n"
        "Snapshot.recheck = changed\n"
        "from llava_convert.cli",
    )
    ran = s3.run(tmp_path, "convert", "s3://models/in", "--to", "hf", "-o", "out", code=meddled)
    assert ran.code == 3 and "changed while it was read" in ran.stderr, ran.stderr
    assert tree(tmp_path) == {}


# --- the web


@dataclass
class Web(Loopback):
    """A web server with a folder; it lists it as a page, and gives parts of files or not."""

    folder: Path = field(default_factory=Path)
    parts: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def env(self) -> dict[str, str]:
        return {"no_proxy": "127.0.0.1"}

    def answer(self, request: Request) -> Answer:
        files = folder_files(self.folder)
        name = request.path.strip("/")
        if not name:
            links = "".join(f'<a href="/{n}">{n}</a>\n' for n in files)
            return Answer(200, links.encode(), {"Content-Type": "text/html"})
        if name not in files:
            return Answer(404)
        return Answer(200, files[name], {"ETag": f'"{name}"'}, ranged=self.parts)


def test_a_file_on_the_web(layouts: dict[str, Path], tmp_path: Path) -> None:
    with Web(layouts["gguf"]) as web:
        ran = shell("inspect", f"{web.url}/tiny-f16.gguf?signature=secret", "--json", code=HURRIED, environment=web.env)
        assert ran.code == 0, ran.stderr
        assert json.loads(ran.stdout)["source"] == f"{web.url}/tiny-f16.gguf", "a signature is nobody's business"
        assert all(seen.range for seen in web.requests if seen.method == "GET")
        ran = shell("convert", f"{web.url}/tiny-f16.gguf", "--to", "hf", "--part", "llm", "-o", "out", code=HURRIED,
                    environment=web.env, cwd=tmp_path)  # fmt: skip
        assert ran.code == 0, ran.stderr
        llava_convert.convert(
            layouts["gguf"] / "tiny-f16.gguf", to="hf", part="llm", out=tmp_path / "local", name="out"
        )
        assert weights_in(tmp_path / "out") == weights_in(tmp_path / "local")


def test_a_folder_on_the_web(layouts: dict[str, Path], tmp_path: Path) -> None:
    with Web(layouts["official"]) as web:
        ran = shell(
            "convert", web.url + "/", "--to", "hf", "-o", "out", code=HURRIED, environment=web.env, cwd=tmp_path
        )
        assert ran.code == 0, ran.stderr
        assert llava_convert.verify(layouts["official"], tmp_path / "out").same


def test_a_server_that_gives_no_parts(layouts: dict[str, Path], tmp_path: Path) -> None:
    with Web(layouts["gguf"], parts=False) as web:
        ran = shell("inspect", f"{web.url}/tiny-f16.gguf", code=HURRIED, environment=web.env)
        assert ran.code == 8 and "the server does not give parts of files" in ran.stderr, ran.stderr
        assert "download it" in ran.stderr


def test_a_web_server_that_fails(layouts: dict[str, Path], tmp_path: Path) -> None:
    with Web(layouts["gguf"]) as web:
        web.fault = lambda number, request: Status(503) if number % 2 else None
        ran = shell("inspect", f"{web.url}/tiny-f16.gguf", code=HURRIED, environment=web.env)
        assert ran.code == 0, ran.stderr
        web.fault = lambda number, request: Status(500)
        ran = shell("inspect", f"{web.url}/tiny-f16.gguf", code=HURRIED, environment=web.env)
        assert ran.code == 8 and "the server answered with an error of its own (500)" in ran.stderr, ran.stderr
        web.fault = lambda number, request: None
        ran = shell("inspect", f"{web.url}/absent.gguf", code=HURRIED, environment=web.env)
        assert ran.code == 8 and "it does not exist" in ran.stderr, ran.stderr
        ran = shell(
            "convert", layouts["official"], "--to", "hf", "-o", f"{web.url}/out", code=HURRIED, environment=web.env
        )
        assert ran.code == 2 and "can be read but not written" in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    "body", [b"<!doctype html><title>Log in</title>", b"null", b"{}", b"", b"\x1b[31m" * 9000], ids=list("pnoec")
)
@pytest.mark.parametrize("name", ["", "tiny-f16.gguf", "model.safetensors"])
def test_a_web_server_that_answers_something_else(
    layouts: dict[str, Path], name: str, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page to log in at, or nothing, in place of a folder or a file: a sentence, and none of what it sent."""
    with Web(layouts["gguf"]) as web:
        monkeypatch.setattr(web, "answer", lambda request: Answer(200, body, {"Content-Type": "text/html"}))
        for talk in ([], ["--verbose"]):
            ran = shell("inspect", f"{web.url}/{name}?signature=secret", *talk, code=HURRIED, environment=web.env)
            assert ran.code == 8, ran.stderr
            assert len(ran.errors) == 1 and "  → " in ran.stderr, ran.stderr
            assert "\x1b" not in str(ran) and "signature" not in str(ran), ran.stderr


def test_what_was_sent_is_proven_before_it_is_kept(s3: Store, layouts: dict[str, Path], tmp_path: Path) -> None:
    """A shard that somebody wrote again since, in the same size, is sent again."""
    arguments = ["convert", layouts["official"], "--to", "hf", "-o", "s3://models/out", "--max-shard-size", "150kB"]
    assert s3.run(tmp_path, *arguments, code=BREAKS, FILES="9", HOW="killed").code == -signal.SIGKILL
    left = s3.objects("out")
    first, *others = json.loads(left[".llava-convert-plan"])["files"]
    changed = bytearray(left[first])
    changed[-1] ^= 1
    s3.client.put_object(Bucket="models", Key=f"out/{first}", Body=bytes(changed))
    ran = s3.run(tmp_path, *arguments, "--resume")
    assert ran.code == 0 and f"resuming: {len(others)} files are there already" in ran.stderr, ran.stderr
    assert s3.run(tmp_path, "verify", layouts["official"], "s3://models/out").code == 0
