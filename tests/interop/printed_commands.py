"""Commands as they are printed, of which a program in this environment does what the named one would do."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def words(command: str) -> list[str]:
    """The words of a command, of which a backslash may carry some to the next line."""
    return shlex.split(command.replace("\\\n", ""))


@contextmanager
def served(line: str, folder: Path) -> Iterator[str]:
    """llama.cpp's server for the files that a printed `llama-server` names from a folder, at a port that is free."""
    xllamacpp = pytest.importorskip("xllamacpp")
    program, *rest = words(line)
    options = dict(zip(*[iter(rest)] * 2, strict=True))
    assert program == "llama-server" and options.keys() in ({"-m"}, {"-m", "--mmproj"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / options["-m"])
    if "--mmproj" in options:
        params.mmproj.path = str(folder / options["--mmproj"])
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server
