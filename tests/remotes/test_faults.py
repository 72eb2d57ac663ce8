"""Hubs and networks that fail: tried again where it may help, else exit 8, one sentence, no token, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llava_convert
from tests.faults.corpus import Ran, shell, tree
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import Answer, Drop, Fault, Request, Status, Truncate, closed_port
from tests.remotes.conftest import Command, Hub, weights_in

HUBS = ["hf", "ms"]


@pytest.fixture
def hub(request: pytest.FixtureRequest, layouts: dict[str, Path]) -> Hub:
    found: Hub = request.getfixturevalue(request.param)
    found.add("org/tiny", layouts["official"])
    return found


def address(hub: Hub) -> str:
    return f"{'hf' if isinstance(hub, HuggingFace) else 'ms'}://org/tiny"


def refused(ran: Ran, hub: Hub, out: Path, *fragments: str) -> None:
    assert ran.code == 8, ran.stderr
    assert len(ran.errors) == 1 and all(fragment in ran.stderr for fragment in fragments), ran.stderr
    assert "Traceback" not in ran.stderr and hub.token not in ran.stdout + ran.stderr
    assert tree(out) == {}, "nothing was written"


FAULTS: dict[str, Callable[[], Fault]] = {
    "429": lambda: Status(429, {"Retry-After": "0"}),
    "500": lambda: Status(500),
    "503": lambda: Status(503),
    "dropped": Drop,
    "truncated": lambda: Truncate(100),
}


@pytest.mark.parametrize(
    ("hub", "fault"),
    [*(("hf", fault) for fault in FAULTS), *(("ms", fault) for fault in ("503", "dropped", "truncated"))],
    indirect=["hub"],
)
def test_every_third_answer_fails_and_the_output_is_the_same(
    command: Command, hub: Hub, fault: str, layouts: dict[str, Path], tmp_path: Path
) -> None:
    broken = 0

    def every_third(number: int, request: Request) -> Fault | None:
        nonlocal broken
        if number % 3 != 2 or request.method == "HEAD":
            return None
        broken += 1
        return FAULTS[fault]()

    hub.fault = every_third
    ran = command("convert", address(hub), "--to", "hf", "-o", "out")
    assert ran.code == 0 and broken > 5, ran.stderr
    llava_convert.convert(layouts["official"], to="hf", out=tmp_path / "local")
    theirs, ours = weights_in(tmp_path / "out"), weights_in(tmp_path / "local")
    assert {n: d for n, d in theirs.items() if n.endswith(".safetensors")} == {
        n: d for n, d in ours.items() if n.endswith(".safetensors")
    }
    assert hub.token not in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("status", "said"), [(401, "401"), (403, "403"), (404, ""), (429, "429"), (500, "500"), (503, "503")]
)
@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_a_status_that_stays(command: Command, hub: Hub, status: int, said: str, tmp_path: Path) -> None:
    hub.fault = lambda number, request: Status(status, {"Retry-After": "0"})
    refused(command("inspect", address(hub)), hub, tmp_path, address(hub), said)


@pytest.mark.parametrize("status", [404, 410, 503])
@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_weights_that_are_gone_when_they_are_read(command: Command, hub: Hub, status: int, tmp_path: Path) -> None:
    hub.fault = lambda number, request: (
        Status(status) if request.headers.get("Range", "bytes=0-").partition("=")[2].split("-")[0] != "0" else None
    )
    ran = command("convert", address(hub), "--to", "hf", "-o", "out")
    refused(ran, hub, tmp_path, f"{address(hub)}/model-0000", "it" if status == 404 else str(status))


@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_answers_that_always_break_off(command: Command, hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda number, request: Truncate(0) if "Range" in request.headers else None
    ran = command("convert", address(hub), "--to", "hf", "-o", "out")
    refused(ran, hub, tmp_path, "6 times in a row")


@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_no_network(command: Command, hub: Hub, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{closed_port()}"
    env = {"HF_ENDPOINT": nowhere, "MODELSCOPE_ENDPOINT": nowhere, "MODELSCOPE_DOMAIN": nowhere}
    ran = command("inspect", address(hub), **env)
    refused(ran, hub, tmp_path, address(hub), "the connection failed")


def test_offline_mode(command: Command, hf: HuggingFace, tmp_path: Path) -> None:
    ran = command("inspect", "hf://org/tiny", HF_HUB_OFFLINE="1")
    refused(ran, hf, tmp_path, "offline mode is on (HF_HUB_OFFLINE)")
    assert not hf.requests


@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_a_wrong_token(command: Command, hub: Hub, tmp_path: Path) -> None:
    wrong = "hf_wrongTokenOfTheTests" if isinstance(hub, HuggingFace) else "ms-9999-wrong-token-of-the-tests"
    hub.repos["org/tiny"].private = True
    ran = command("inspect", address(hub), "--verbose", HF_TOKEN=wrong, MODELSCOPE_API_TOKEN=wrong)
    assert ran.code == 8, ran.stderr
    assert wrong not in ran.stdout + ran.stderr and tree(tmp_path) == {}


@pytest.mark.parametrize("status", [400, 401, 403, 404])
@pytest.mark.parametrize("way", [[], ["--cache"]], ids=["in place", "cached"])
@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_what_a_server_repeats_is_not_printed(
    command: Command, hub: Hub, way: list[str], status: int, tmp_path: Path
) -> None:
    """Its answer holds the token, a signed address and escape codes, as do the headers that its client logs."""

    def echo(number: int, request: Request) -> Fault:
        text = f"bad {request.headers.get('Authorization')} {hub.token} https://u:pw@h/x?signature=key#part \x1b[31m"
        said = {"X-Error-Message": text.replace("\x1b", ""), "X-HF-Warning": f"t; {hub.token} /x?signature=key"}
        return Status(status, said, json.dumps({"error": text, "Message": text, "Code": 1}).encode())

    hub.fault = echo
    for talk in ([], ["--verbose"]):
        ran = command("convert", address(hub), "--to", "hf", "-o", "out", *way, *talk)
        assert ran.code == 8 and len(ran.errors) == 1 and address(hub) in ran.errors[0], ran.stderr
        assert "  → " in ran.stderr and bool(talk) == ("Traceback" in ran.stderr), ran.stderr
        assert not [secret for secret in (hub.token, "signature=key", "u:pw", "\x1b") if secret in str(ran)], ran.stderr
    assert str(status) in ran.stderr and tree(tmp_path) == {}, "--verbose has the details"


@pytest.mark.parametrize("body", [b"null", b"[]", b"{}", b"<!doctype html><title>Log in</title>", b"\xff"])
@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_answers_that_make_no_sense(command: Command, hub: Hub, body: bytes, tmp_path: Path) -> None:
    """A page of a hotel's network, or no object, where the hub's answer is expected."""
    hub.fault = lambda number, request: Status(200, {"Content-Type": "text/html"}, body)
    refused(command("inspect", address(hub)), hub, tmp_path, address(hub))


def test_a_gated_model(command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path) -> None:
    hf.add("org/gated", layouts["hf"], gated=True)
    ran = command("inspect", "hf://org/gated", HF_TOKEN="")
    refused(ran, hf, tmp_path, "access is given on request")


def test_a_typing_error_in_a_path_is_told_as_such(command: Command, hf: HuggingFace, tmp_path: Path) -> None:
    """`work_dirs/run` looks like a hub's id; `work_dirs/iter_1.pth` can be none."""
    ran = command("inspect", "work_dirs/run")
    refused(ran, hf, tmp_path, "there is no work_dirs/run here, and hf://work_dirs/run: the model does not exist")
    hf.forget()
    ran = command("inspect", "work_dirs/iter_1.pth")
    assert ran.code == 3 and "work_dirs/iter_1.pth does not exist" in ran.stderr and not hf.requests


def test_a_base_that_the_hub_refuses_is_a_missing_input(
    command: Command, hf: HuggingFace, tiny: Path, tmp_path: Path
) -> None:
    ran = command("pth", tiny / "iter_2.pth", "--to", "hf", "--visual-encoder", "org/absent")
    assert ran.code == 3 and "--visual-encoder" in ran.stderr and "org/absent" in ran.stderr
    assert tree(tmp_path) == {}


# The client's own way to ask, of a server whose answer to a range never ends.
ENDLESS = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from llava_convert.storage.hubs.huggingface import _body

class Endless(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 10_000)
        except OSError:
            pass

server = HTTPServer(("127.0.0.1", 0), Endless)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = _body(f"http://127.0.0.1:{server.server_port}/x", {"Range": "bytes=0-99"}, 101)
print(found == b"x" * 101)
"""


def test_no_more_is_read_than_was_asked_for(hf: HuggingFace) -> None:
    ran = shell(code=ENDLESS, environment=hf.env, timeout=30)
    assert ran.stdout == "True\n", ran.stderr


BODIES = {
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"5",
    "text": b'"x"',
    "nested": b'{"Data": null, "siblings": [null], "data": [[]]}',
    "page": b"<!doctype html><title>Log in</title>",
    "escape": b'{"error": "\\u001b[31m", "Message": "\x1b[31m"}',
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("job", ["convert", "cached", "upload"])
@pytest.mark.parametrize("hub", HUBS, indirect=True)
def test_one_answer_that_makes_no_sense(
    command: Command,
    hub: Hub,
    job: str,
    body: str,
    layouts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each answer of the hub's API in turn, the others as they should be: exit 8 in a sentence, or it is not needed."""
    name = "huggingface" if isinstance(hub, HuggingFace) else "modelscope"
    arguments: list[str | Path] = {
        "convert": ["convert", address(hub), "--to", "hf", "-o", "out"],
        "cached": ["convert", address(hub), "--to", "hf", "-o", "out", "--cache"],
        "upload": ["upload", layouts["gguf"], "org/new", "--hub", name, "--verify", "off"],
    }[job]
    usual = hub.answer
    number, asked = 0, 1
    while number < asked:
        asked = 0

        def answer(request: Request, number: int = number) -> Answer:
            nonlocal asked
            found = usual(request)
            if "json" not in found.headers.get("Content-Type", "") or request.path.endswith(".json"):
                return found
            asked += 1
            return Answer(200, BODIES[body], found.headers) if asked == number + 1 else found

        monkeypatch.setattr(hub, "answer", answer)
        shutil.rmtree(hub.home / ("hub" if name == "huggingface" else "cache"), ignore_errors=True)
        hub.repos.pop("org/new", None)
        ran = command(*arguments)
        assert ran.code in (0, 8), (number, ran.stderr)
        assert ran.code == 0 or (len(ran.errors) == 1 and "  → " in ran.stderr), (number, ran.stderr)
        assert "Traceback" not in ran.stderr and "\x1b" not in str(ran), (number, ran.stderr)
        assert ran.code == 0 or tree(tmp_path) == {}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        number += 1
    assert number > 0, "the hub was asked"
