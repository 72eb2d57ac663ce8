"""Programs of other projects, each in its own environment under `.venvs`, which `make peers` builds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT

PEERS = CHECKOUT / ".venvs"
SCRIPTS = CHECKOUT / "tests" / "peers"


def in_peer(environment: str, script: str, job: Any, cwd: Path) -> dict[str, Any]:
    """Run a script of tests/peers with the Python of an environment: a job as JSON in, a JSON result out."""
    python = PEERS / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        pytest.skip(f"no environment {environment}: `make peers` builds it")
    result = cwd / f"{environment}-{script}.json"
    done = subprocess.run(
        [python, SCRIPTS / script, result],
        input=json.dumps(job),
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert done.returncode == 0, f"{environment} {script}:\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded
