"""Remote files as streams and ranges: the bytes that were asked for, whatever the server gives at a time."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_convert.core import hub_names as hub
from llava_convert.core import retry
from llava_convert.core.errors import HubError, InputError, UnsafeError, UsageError
from llava_convert.core.retry import TransientError, patiently
from llava_convert.storage import ranges
from llava_convert.storage.files import open_regular, read_fully, size_of
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.remote import files as remote
from llava_convert.storage.remote.files import Remote, RemoteFile, RemoteStream
from llava_convert.storage.remote.memory import give_back
from llava_convert.storage.remote.mounts import mounted, remote_of
from llava_convert.storage.remote.reach import reach, url_of
from llava_convert.storage.remote.session import Session

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and pieces small enough that a short file has many; no pauses."""
    monkeypatch.setattr(remote, "FIRST", 1000)
    monkeypatch.setattr(remote, "PIECE", 16_000)
    monkeypatch.setattr(remote, "KEPT", 20_000)
    monkeypatch.setattr(ranges, "FIRST", 1000)
    monkeypatch.setattr(ranges, "REMOTE_PIECE", 8000)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)


class Server:
    """Gives at most `most` bytes an answer; every `fails`-th fails."""

    def __init__(self, most: int = 10**9, fails: int = 10**9, files: dict[str, bytes] | None = None) -> None:
        self.most, self.fails, self.files = most, fails, files or {"w.safetensors": DATA}
        self.asked: list[tuple[str, int, int]] = []

    def read(self, name: str, start: int, end: int) -> bytes:
        self.asked.append((name, start, end))
        if len(self.asked) % self.fails == 0:
            raise TransientError("busy")
        return self.files[name][start : min(end, start + self.most)]

    @property
    def remote(self) -> Remote:
        return Remote(
            "hf://org/m", {n: len(d) for n, d in self.files.items()}, self.read, lambda name: "1", "org/m", "c0"
        )

    @property
    def file(self) -> RemoteFile:
        return RemoteFile(self.remote, "w.safetensors", len(DATA))


@pytest.fixture
def root() -> Iterator[Path]:
    files = {"w.safetensors": DATA, "config.json": b'{"a": 1}', "sub/x.gguf": b"GGUF"}
    with Session() as session:
        yield session.mount(Server(files=files).remote).root


# --- streams and ranges


@given(
    moves=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(1, 40_000)), max_size=12),
    most=st.integers(1000, 50_000),
    fails=st.integers(2, 9),
)
def test_a_stream_reads_what_a_file_reads(moves: list[tuple[int, int]], most: int, fails: int) -> None:
    stream = RemoteStream(Server(most, fails).file)
    for at, count in moves:
        stream.seek(at)
        assert read_fully(stream, count, Path("x")) == DATA[at : at + count]
        assert stream.tell() == min(at + count, max(at, len(DATA)))


@given(
    reads=st.lists(
        st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, 30_000), st.integers(0, 60_000)), max_size=12
    ),
    most=st.integers(1000, 50_000),
)
def test_ranges_read_what_a_file_holds(reads: list[tuple[int, int, int]], most: int) -> None:
    server = Server(most)
    with Session() as session, FilePool() as pool:
        path = session.mount(server.remote).root / "w.safetensors"
        for at, count, more in reads:
            count = min(count, len(DATA) - at)
            buffer = bytearray(count)
            pool.read_into(path, at, buffer, until=min(at + count + more, len(DATA)))
            assert buffer == DATA[at : at + count]


def test_reads_in_a_row_are_served_of_one_piece(root: Path) -> None:
    server = Server()
    with Session() as session, FilePool() as pool:
        path = session.mount(server.remote).root / "w.safetensors"
        for at in range(0, 80_000, 500):
            buffer = bytearray(500)
            pool.read_into(path, at, buffer, until=80_000)
            assert buffer == DATA[at : at + 500]
    assert [(start, end) for _, start, end in server.asked] == [(n, n + 8000) for n in range(0, 80_000, 8000)]


def test_small_neighbours_are_fetched_together(root: Path) -> None:
    server = Server()
    with Session() as session, FilePool() as pool:
        path = session.mount(server.remote).root / "w.safetensors"
        for at in range(5000, 5900, 100):
            pool.read_into(path, at, bytearray(100), until=at + 100)
    assert server.asked == [("w.safetensors", 5000, 6000)]


def test_a_header_costs_a_window_and_going_on_doubles_it() -> None:
    server = Server()
    stream = RemoteStream(server.file)
    assert read_fully(stream, 8, Path("x")) == DATA[:8]
    assert [end - start for _, start, end in server.asked] == [1000]
    for _ in range(60):
        stream.read(500)
    assert [end - start for _, start, end in server.asked] == [1000, 2000, 4000, 8000, 16000]


def test_what_was_read_of_headers_is_not_asked_for_again() -> None:
    server = Server()
    file = server.file
    for _ in range(3):
        assert read_fully(RemoteStream(file), 900, Path("x")) == DATA[:900]
    assert len(server.asked) == 1


def test_places_that_are_read_next_are_fetched_apart_and_once() -> None:
    """The records of a torch file lie between its tensors: a window at each would fetch a thousand times as much."""
    server = Server()
    file = server.file
    places = [(at, 40) for at in range(5000, 200_000, 10_000)] + [(100_050, 40), (299_990, 40)]
    file.prefetch(places)
    stream = RemoteStream(file)
    for at, length in places:
        stream.seek(at)
        assert read_fully(stream, length, Path("x")) == DATA[at : at + length]
    assert len(server.asked) == 22 and sum(end - start for _, start, end in server.asked) < 1000


def test_threads_share_a_file() -> None:
    server = Server(most=3000)
    wrong: list[int] = []
    with Session() as session, FilePool() as pool:
        path = session.mount(server.remote).root / "w.safetensors"

        def walk(first: int) -> None:
            for at in range(first, first + 50_000, 700):
                buffer = bytearray(700)
                pool.read_into(path, at, buffer, until=first + 60_000)
                if buffer != DATA[at : at + 700]:
                    wrong.append(at)

        threads = [threading.Thread(target=walk, args=(n * 30_000,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_what_lies_beyond_the_end_is_an_input_error(root: Path) -> None:
    with FilePool() as pool, pytest.raises(InputError, match=r"hf://org/m/w\.safetensors ends at 300,000 bytes"):
        pool.read_into(root / "w.safetensors", len(DATA) - 1, bytearray(2))


# --- patience


def test_what_passes_is_tried_again_and_what_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr("time.sleep", pauses.append)
    answers = iter([TransientError("busy"), TransientError("busy", after=7.0), "done"])

    def attempt() -> str:
        answer = next(answers)
        if isinstance(answer, TransientError):
            raise answer
        return str(answer)

    assert patiently("there", attempt) == "done"
    assert pauses == [0.2, 7.0]
    pauses.clear()
    with pytest.raises(HubError, match=r"^there: busy, 6 times in a row$") as caught:
        patiently("there", lambda: (_ for _ in ()).throw(TransientError("busy")))
    assert caught.value.exit_code == 8 and pauses == [pytest.approx(0.2 * 2.5**n) for n in range(5)]


def test_a_server_that_ignores_the_range() -> None:
    server = Server()
    server.read = lambda name, start, end: DATA  # type: ignore[method-assign]
    with pytest.raises(HubError, match="gives the whole file where a part was asked for"):
        server.file.fetch(10, 20)


# --- mounting


def test_a_mounted_folder_looks_like_the_remote_one(root: Path) -> None:
    assert root.name == "m" and sorted(p.name for p in root.iterdir()) == ["config.json", "sub", "w.safetensors"]
    assert (root / "w.safetensors").stat().st_size == len(DATA)
    with open_regular(root / "w.safetensors") as stream:
        assert size_of(stream) == len(DATA) and stream.read(5) == DATA[:5]
    found = mounted(root / "sub" / "x.gguf")
    assert found is not None and (found.repo, found.commit) == ("org/m", "c0")


def test_small_files_are_fetched_once_and_lie_there_then(root: Path) -> None:
    assert remote_of(root / "config.json") is None
    assert (root / "config.json").read_bytes() == b'{"a": 1}'
    assert remote_of(root / "w.safetensors") is not None


def test_nothing_is_left_of_a_mount() -> None:
    with Session() as session:
        root = session.mount(Server().remote).root
        assert session.called(root / "x") == "hf://org/m/x"
    assert not root.parent.exists() and remote_of(root / "w.safetensors") is None


@pytest.mark.parametrize(
    "derive",
    [
        lambda root: root / "sub" / "x.gguf",
        lambda root: root.joinpath("sub", "x.gguf"),
        lambda root: next(root.rglob("*.gguf")),
        lambda root: next((root / "sub").iterdir()),
        lambda root: (root / "sub" / "y.gguf").with_name("x.gguf"),
        lambda root: (root / "sub" / "x.bin").with_suffix(".gguf"),
        lambda root: (root / "w.safetensors").parent / "sub/x.gguf",
        lambda root: (root / "sub" / "x.gguf").expanduser().absolute(),
    ],
)
def test_what_is_made_of_a_mounted_path_is_of_the_mount(root: Path, derive: Callable[[Path], Path]) -> None:
    found = remote_of(derive(root))
    assert found is not None and found.address == "hf://org/m/sub/x.gguf"


def test_a_folder_around_a_mount_is_not_of_it(root: Path) -> None:
    assert mounted(root.parent) is None and remote_of(root.parent / "w.safetensors") is None


def test_errors_and_paths_speak_of_the_address() -> None:
    with Session() as session:
        root = session.mount(Server().remote).root
        assert session.address_of(root) == "hf://org/m" and session.address_of(Path("here")) == Path("here")
        assert session.name_of(root) == "m"
    with pytest.raises(InputError) as caught, Session() as session:
        root = session.mount(Server().remote).root
        raise InputError(f"{root}/w.safetensors: broken", hint=f"look at {root}")
    assert str(caught.value) == caught.value.message == "hf://org/m/w.safetensors: broken"
    assert caught.value.hint == "look at hf://org/m"


def test_two_sessions_have_names_and_counts_of_their_own() -> None:
    with Session() as one, Session() as two:
        first, second = one.mount(Server().remote).root, two.mount(Server().remote).root
        assert first != second and two.called(first) == str(first)
        found = remote_of(first / "w.safetensors")
        assert found is not None and found.fetch(0, 10) == DATA[:10]
        assert (one.fetched.bytes, two.fetched.bytes) == (10, 0)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:x", ""])
def test_names_that_lead_out(name: str) -> None:
    with Session() as session, pytest.raises(UnsafeError, match="is not a name for a file inside a folder"):
        session.mount(Server(files={name: b"x"}).remote)


@pytest.mark.parametrize("files", [{"w.safetensors": -1}, {"w.safetensors": 1 << 62}, {"a": 1, "a/b": 1}])
def test_listings_that_make_no_sense(files: dict[str, int]) -> None:
    server = Server()
    with Session() as session, pytest.raises(HubError, match="cannot be"):
        session.mount(Remote("hf://org/m", files, server.read, lambda name: "1"))


def test_a_listing_that_would_exhaust_the_machine() -> None:
    files = {f"{n}.json": 1 for n in range(100_001)}
    with Session() as session, pytest.raises(UnsafeError, match="100,001 files"):
        session.mount(Remote("hf://org/m", files, Server().read, lambda name: "1"))


# --- addresses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", ("hf", "org/name", None, "")),
        ("org/name@v1.0", ("hf", "org/name", "v1.0", "")),
        ("hf://org/name", ("hf", "org/name", None, "")),
        ("hf://org/name/", ("hf", "org/name", None, "")),
        ("hf://org/name@abc/sub/x.pth", ("hf", "org/name", "abc", "sub/x.pth")),
        ("hf://org/name@refs/pr/7/x.gguf", ("hf", "org/name", "refs/pr/7", "x.gguf")),
        ("ms://org/na-me_1.5", ("ms", "org/na-me_1.5", None, "")),
        ("org/name/sub", None),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("hf://name", None),
        ("s3://org/name", None),
    ],
)
def test_addresses(text: str, found: tuple[str, str, str | None, str] | None) -> None:
    address = hub.parse(text)
    assert (address and (address.hub, address.repo, address.revision, address.path)) == found


@pytest.mark.parametrize(
    ("text", "id"), [("org/name@v1", "org/name"), ("ms://org/name", "org/name"), ("hf://org/n", "org/n"), ("x", "x")]
)
def test_published_ids(text: str, id: str) -> None:
    assert hub.published_id(text) == id


def test_outputs_at_urls() -> None:
    assert url_of(Path("s3://bucket/folder")) == "s3://bucket/folder"
    assert url_of(Path("out/s3")) is None and url_of(Path("C:/out")) is None


@pytest.mark.parametrize("scheme", ["hf", "ms"])
@pytest.mark.parametrize("secret", ["org/m?token=KEY", "org/m#KEY", "me:KEY@org/m", "org/m@v1?token=KEY"])
def test_secrets_in_an_address_are_not_repeated(scheme: str, secret: str) -> None:
    for ask in (lambda text: reach(text, Session()), lambda text: url_of(Path(text))):
        with pytest.raises(UsageError) as caught:
            ask(f"{scheme}://{secret}")
        assert scheme in caught.value.message and "KEY" not in f"{caught.value.message} {caught.value.hint}"


def test_a_local_source_is_a_local_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder here comes before a model of the same name on the Hub."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert reach("org/name", Session()) == Path("org/name")
    assert reach(f"file://{tmp_path}/org", Session()) == tmp_path / "org"


def test_a_command_looks_for_cycles_once_it_has_a_network() -> None:
    """Each request leaves one, and a command has the search off."""
    give_back.cache_clear()
    gc.disable()
    try:
        with Session() as session:
            assert not gc.isenabled()
            session.mount(Remote("hf://org/m", {}, Server().read, lambda name: "1"))
            assert gc.isenabled()
    finally:
        gc.enable()
