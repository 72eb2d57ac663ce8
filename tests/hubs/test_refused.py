"""What a hub or the network refuses: exit 8, one sentence, what mends it, and no token anywhere (fault row 78)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.hubs.conftest import Side, arrived, heal
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import Drop, Fault, Request, Status, Truncate, closed_port
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Ran, Runner

# Of each hub, a request that reads, one that writes weights, and the one after which all counts.
STEPS = {
    "huggingface": {"create": "/api/repos/create", "list": "/tree/", "put": "/put/", "commit": "/commit/"},
    "modelscope": {"create": "/api/v1/models", "list": "/repo/files", "put": "/put/", "commit": "/commit/"},
}
STATUSES = {
    401: "does not accept the token",
    403: "://org/model: the token may not write to it (403)",
    404: "://org/model: the repository does not exist",
    409: "://org/model: it was changed at the same time",
    429: "too many requests",
    500: "answered with an error of its own (500)",
    503: "answered with an error of its own (503)",
    418: "refused (418)",
}


def secrets(*servers: HuggingFace | ModelScope) -> list[str]:
    return [server.token for server in servers]


def refused(found: Ran, sentence: str, hidden: list[str]) -> None:
    assert found.code == 8, found.said
    assert found.stdout == ""
    assert [line for line in found.stderr.splitlines() if line.startswith("error: ") and sentence in line], found.said
    assert re.search(r"^  → \S", found.stderr, re.M) and "Traceback" not in found.stderr
    assert not [secret for secret in hidden if secret in found.said]
    assert "signature=" not in found.said


def step_of(side: Side, request: Request) -> str:
    """Which of the steps a request belongs to; "" for the others."""
    exact = {"/api/v1/models": "create"}
    if request.path in exact:
        return exact[request.path]
    return next((s for s, part in STEPS[side.name].items() if part in request.path and part not in exact), "")


@pytest.mark.parametrize(
    ("step", "code"),
    [
        *[("create", code) for code in (401, 403, 429, 503)],
        *[("list", code) for code in (401, 404, 503)],
        *[("put", code) for code in (403, 429, 500)],
        *[("commit", code) for code in STATUSES],
    ],
)
def test_each_status(side: Side, runner: Runner, outputs: dict[str, Path], step: str, code: int) -> None:
    """From a request of some step on the hub answers with a status, whatever the client tries."""
    wait = {"Retry-After": "1"} if code == 429 else {}
    answer = Status(code, wait, b'{"error": "no", "Message": "no"}')
    side.server.fault = lambda n, request: answer if step_of(side, request) == step else None
    found = runner("upload", outputs["official"], "org/model", "--hub", side.name)
    refused(found, STATUSES[code], secrets(side.server))
    if step == "commit":
        heal(side.server)
        assert runner("upload", outputs["official"], "org/model", "--hub", side.name).code == 0
        arrived(side, "org/model", outputs["official"])
        assert side.puts() == []


@pytest.mark.parametrize("code", [404, 501])
def test_a_server_that_takes_uploads_and_lists_nothing(
    side: Side, runner: Runner, outputs: dict[str, Path], code: int
) -> None:
    """A mirror with a part of the hub's calls says nothing of why: all is sent, and that nobody compared it is told."""
    page = Status(code, {"Content-Type": "text/html"}, b"<html><body>Not here</body></html>")
    side.server.fault = lambda n, request: page if step_of(side, request) == "list" else None
    found = runner("upload", outputs["official"], "org/model", "--hub", side.name)
    assert found.code == 0 and "its client's word alone" in found.stderr, found.said
    assert found.stdout.endswith(", sent\n")
    arrived(side, "org/model", outputs["official"])


def test_a_hub_that_is_busy_for_a_moment(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    """Each kind of request, the first time: 429 and 503 in turn. The upload ends well."""
    seen: list[str] = []

    def fault(n: int, request: Request) -> Fault | None:
        kind = request.path.partition("/put/")[1] or request.path
        if kind in seen:
            return None
        seen.append(kind)
        return Status(503) if len(seen) % 2 else Status(429, {"Retry-After": "0"})

    side.server.fault = fault
    found = runner("upload", outputs["official"], "org/model", "--hub", side.name)
    assert found.code == 0, found.said
    arrived(side, "org/model", outputs["official"])
    assert len(seen) >= 5
    assert sum(request.status in (429, 503) for request in side.server.requests) == len(seen)


def test_no_network(side: Side, runner: Runner, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Nobody listens at the hub's address."""
    url = f"http://127.0.0.1:{closed_port()}"
    environment = side.server.env | {"HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url, "MODELSCOPE_DOMAIN": url}
    with Runner(environment) as elsewhere:
        found = elsewhere("upload", outputs["official"], "org/model", "--hub", side.name)
    refused(found, "the connection failed", secrets(side.server))


def test_offline_mode(runner: Runner, huggingface: HuggingFace, outputs: dict[str, Path]) -> None:
    with Runner(huggingface.env | {"HF_HUB_OFFLINE": "1"}) as offline:
        found = offline("upload", outputs["official"], "org/model")
    refused(found, "offline mode is on (HF_HUB_OFFLINE)", secrets(huggingface))
    assert huggingface.requests == []


TOKENS = {
    "huggingface": ("HF_TOKEN", "hf_wrongTokenOfTheTests"),
    "modelscope": ("MODELSCOPE_API_TOKEN", "ms-wrong-token"),
}


@pytest.mark.parametrize("talk", ["", "--verbose", "--json"])
def test_wrong_token(side: Side, outputs: dict[str, Path], talk: str) -> None:
    name, wrong = TOKENS[side.name]
    with Runner(side.server.env | {name: wrong}) as run:
        found = run("upload", outputs["official"], "org/model", "--hub", side.name, *([talk] if talk else []))
    assert found.code == 8
    assert "does not accept the token" in found.stderr
    assert wrong not in found.said and side.server.token not in found.said
    if talk == "--json":
        assert found.json()["exit_code"] == 8
    if talk == "--verbose":
        assert "Traceback" in found.stderr and "401" in found.stderr
    assert side.server.repos == {}


def test_no_token(side: Side, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Said before anything is read or sent."""
    name, _ = TOKENS[side.name]
    with Runner(side.server.env | {name: ""}) as run:
        found = run("upload", outputs["official"], "org/model", "--hub", side.name)
    refused(found, "there is no token for", [])
    assert name in found.stderr and side.server.requests == []


@pytest.mark.parametrize("talk", ["", "--verbose"])
@pytest.mark.parametrize("step", ["create", "list", "put", "commit"])
def test_no_token_in_any_message(side: Side, runner: Runner, outputs: dict[str, Path], step: str, talk: str) -> None:
    """Not even where the hub's own answer holds it."""
    token = side.server.token
    body = f'{{"error": "bad {token}", "Message": "bad Bearer {token} at https://h/x?signature=key"}}'.encode()
    side.server.fault = lambda n, request: (
        Status(418, {"X-Error-Message": f"bad {token}"}, body) if step_of(side, request) == step else None
    )
    found = runner("upload", outputs["official"], "org/model", "--hub", side.name, *([talk] if talk else []))
    assert found.code == 8, found.said
    assert token not in found.said and "signature=key" not in found.said


def test_answers_that_are_none(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    """A page of a hotel's network instead of the hub's answer; an answer that is cut off."""
    for fault in (Status(200, {"Content-Type": "text/html"}, b"<html>log in</html>"), Truncate(3)):
        side.server.fault = lambda n, request, fault=fault: fault
        found = runner("upload", outputs["official"], "org/model", "--hub", side.name)
        assert found.code == 8, found.said
        assert found.stderr.count("error: ") == 1 and "bug in llava-convert" not in found.stderr


def test_a_hub_that_loses_a_file(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    """The client says that it is done, and the hub's listing says otherwise: not done."""
    folder = outputs["official"]

    def lose(n: int, request: Request) -> Fault | None:
        if STEPS[side.name]["list"] in request.path and "org/model" in side.server.repos:
            repo = side.server.repos["org/model"]
            files = repo.files(side.branch)
            if "config.json" in files:
                del files["config.json"]
                files["tokenizer.json"] = b"x" * len(files["tokenizer.json"])
        return None

    side.server.fault = lose
    found = runner("upload", folder, "org/model", "--hub", side.name)
    refused(found, "config.json, tokenizer.json", secrets(side.server))
    heal(side.server)
    assert runner("upload", folder, "org/model", "--hub", side.name).code == 0
    arrived(side, "org/model", folder)


def test_dropped_for_good_names_the_command(side: Side, runner: Runner, tiny: Path, tmp_path: Path) -> None:
    """A conversion whose push fails keeps its output and says how to go on."""
    side.server.fault = lambda n, request: Drop()
    out = tmp_path / "o"
    found = runner(
        "pth",
        tiny / "iter_2.pth",
        "--to",
        "xtuner",
        "-o",
        out,
        "--push",
        "org/model",
        "--hub",
        side.name,
        cwd=tiny.parents[1],
    )
    assert found.code == 8, found.said
    assert (out / "conversion.json").is_file()
    command = f"llava-convert upload {out} org/model --hub {side.name}"
    assert "is converted and kept, but not published" in found.stderr and command in found.stderr
    heal(side.server)
    assert runner(*command.split()[1:]).code == 0
    arrived(side, "org/model", out)


@pytest.mark.parametrize("kind", ["file", "folder", "nowhere"])
def test_a_link_out_of_the_folder(side: Side, runner: Runner, copied: Path, tmp_path: Path, kind: str) -> None:
    """Nothing is sent, not even asked."""
    away = tmp_path / "away"
    if kind == "file":
        away.write_text("secret")
    elif kind == "folder":
        away.mkdir()
        (away / "id").write_text("secret")
    (copied / "link").symlink_to(away)
    found = runner("upload", copied, "org/model", "--hub", side.name)
    assert found.code == 5 and "link: is a link that leaves its folder" in found.stderr
    assert side.server.requests == []


def test_a_link_within_the_folder_is_its_content(side: Side, runner: Runner, copied: Path) -> None:
    (copied / "again.json").symlink_to("config.json")
    os.mkfifo(copied / "pipe")
    assert runner("upload", copied, "org/model", "--hub", side.name).code == 0
    there = side.files("org/model")
    assert there["again.json"] == (copied / "config.json").read_bytes() and "pipe" not in there
