"""Commands as they are printed, of which a program in this environment does what the named one would do."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def words(command: str) -> list[str]:
    """The words of a command, of which a backslash may carry some to the next line."""
    return shlex.split(command.replace("\\\n", ""))


# In a process of its own, which ends without the server's destructor: that has been seen to wait for ever.
_SERVER = """
import os, sys, xllamacpp
model, mmproj, port = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = model, mmproj
params.hostnames, params.port = ["127.0.0.1"], int(port)
params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def served(line: str, folder: Path) -> Iterator[str]:
    """llama.cpp's server for the files that a printed `llama-server` names from a folder, at a port that is free."""
    pytest.importorskip("xllamacpp")
    program, *rest = words(line)
    options = dict(zip(*[iter(rest)] * 2, strict=True))
    assert program == "llama-server" and options.keys() in ({"-m"}, {"-m", "--mmproj"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [str(folder / options["-m"]), str(folder / options["--mmproj"]) if "--mmproj" in options else ""]
    command = [sys.executable, "-c", _SERVER, *files, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        address = next((said.strip() for said in server.stdout if said.startswith("http")), None)
        assert address is not None, "the server ended at once"
        try:
            yield address
        finally:
            server.stdin.close()
