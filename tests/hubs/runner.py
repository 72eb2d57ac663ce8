"""Runs the command many times, each time in a process of its own that a test may kill, without starting Python anew.

The hubs' clients read their environment when they are imported, so one process imports all of it once; each run is a
fork of that. Waiting is cut short there: the clients' patience with a server is theirs, and tests need none of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60  # no run takes as long


@dataclass(frozen=True)
class Ran:
    code: int  # negative: the signal that ended it
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    def json(self) -> Any:
        return json.loads(self.stdout)


class Runner:
    """A context manager; call it with the command's arguments. `pid` is that of the run in progress."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._place = Path(self._folder.name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hubs.runner", str(self._place)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return int((self._place / "pid").read_text())

    def __call__(self, *arguments: str | Path, cwd: Path | None = None, **environment: str | None) -> Ran:
        assert self._process.stdin is not None and self._process.stdout is not None
        wish = {"arguments": [*map(str, arguments)], "cwd": str(cwd or self._place), "environment": environment}
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ran(code, (self._place / "stdout").read_text(), (self._place / "stderr").read_text())


def _serve(place: Path) -> None:
    import time

    patient = time.sleep
    time.sleep = lambda seconds: patient(min(seconds, 0.001))
    # All that a command imports, so that a fork has it.
    import pkgutil
    from importlib import import_module

    import huggingface_hub
    import modelscope_hub
    import tokenizers
    import xxhash
    import yaml  # noqa: F401

    import llava_convert.cli

    assert huggingface_hub.HfApi and modelscope_hub.HubApi  # their submodules are imported by name only
    assert tokenizers.Tokenizer and xxhash.xxh3_128
    for module in pkgutil.walk_packages(llava_convert.__path__, "llava_convert."):
        if module.name.rpartition(".")[2] != "__main__" and "projector_code" not in module.name:
            import_module(module.name)
    # The first command of a process imports what parses commands, and reads the tables: four times as long as the rest.
    sys.argv = ["llava-convert", "layouts"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        llava_convert.cli.main()
    for line in sys.stdin:
        wish = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(place, wish)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(place: Path, wish: dict[str, Any]) -> None:
    import faulthandler

    (place / "pid").write_text(str(os.getpid()))
    os.chdir(wish["cwd"])
    for name, value in wish["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    sys.argv = ["llava-convert", *wish["arguments"]]
    code = 1
    with contextlib.suppress(Exception):
        try:
            from llava_convert.cli import main

            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
