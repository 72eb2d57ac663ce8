"""An upload that is cut at each of its requests in turn, in three ways, and the same command again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.hubs.conftest import Side, arrived, empty, heal
from tests.hubs.loopback import Drop, Fault, Request
from tests.hubs.runner import Runner

LAYOUTS = ("official", "gguf")


def requests_of(side: Side, runner: Runner, folder: Path) -> list[str]:
    """What one upload asks, when nothing fails."""
    found = runner("upload", folder, "org/whole", "--hub", side.name)
    assert found.code == 0, found.said
    lines = side.server.lines()
    empty(side.server)
    assert len(lines) >= 8
    return lines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_network_gone_from_each_request_on(side: Side, runner: Runner, outputs: dict[str, Path], layout: str) -> None:
    folder = outputs[layout]
    lines = requests_of(side, runner, folder)
    for cut in range(len(lines)):
        empty(side.server)
        side.server.fault = lambda n, request, cut=cut: Drop() if n >= cut else None
        found = runner("upload", folder, "org/model", "--hub", side.name)
        assert found.code == 8, (lines[cut], found.said)
        assert found.stdout == "" and found.stderr.count("error: ") == 1
        there = set(side.server.objects)
        heal(side.server)
        again = runner("upload", folder, "org/model", "--hub", side.name)
        assert again.code == 0, (lines[cut], again.said)
        arrived(side, "org/model", folder)
        # What had arrived was not sent again.
        assert not [path for path in side.puts() if any(oid in path for oid in there)], lines[cut]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_each_request(side: Side, runner: Runner, outputs: dict[str, Path], layout: str) -> None:
    folder = outputs[layout]
    before = sorted(folder.iterdir())
    lines = requests_of(side, runner, folder)
    for cut in range(len(lines)):
        empty(side.server)

        def kill(n: int, request: Request, cut: int = cut) -> Fault | None:
            if n != cut:
                return None
            os.kill(runner.pid, signal.SIGKILL)
            return Drop()

        side.server.fault = kill
        assert runner("upload", folder, "org/model", "--hub", side.name).code == -signal.SIGKILL
        heal(side.server)
        again = runner("upload", folder, "org/model", "--hub", side.name)
        assert again.code == 0, (lines[cut], again.said)
        arrived(side, "org/model", folder)
    assert sorted(folder.iterdir()) == before  # no cache of a client was left


def test_one_answer_lost(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    """The request had its effect, and the connection broke before the answer: the upload goes on by itself."""
    folder = outputs["official"]
    lines = requests_of(side, runner, folder)
    for cut in range(len(lines)):
        empty(side.server)
        side.server.fault = lambda n, request, cut=cut: Drop(after=True) if n == cut else None
        found = runner("upload", folder, "org/model", "--hub", side.name)
        assert found.code == 0, (lines[cut], found.said)
        arrived(side, "org/model", folder)


def test_ctrl_c(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    folder = outputs["official"]
    stopped: list[int] = []

    def stop(n: int, request: Request) -> Fault | None:
        if request.method == "PUT" and not stopped:
            stopped.append(n)
            os.kill(runner.pid, signal.SIGINT)
            time.sleep(3)
            return Drop()
        return None

    side.server.fault = stop
    begun = time.monotonic()
    found = runner("upload", folder, "org/model", "--hub", side.name)
    assert (found.code, found.stdout) == (130, ""), found.said
    assert time.monotonic() - begun < 2.5  # the file under way is not waited for
    assert "the same command again" in found.stderr and "Traceback" not in found.stderr
    heal(side.server)
    assert runner("upload", folder, "org/model", "--hub", side.name).code == 0
    arrived(side, "org/model", folder)
