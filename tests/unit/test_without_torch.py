"""Converting without torch, transformers, peft and accelerate, as if they were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BLOCKED = """
import importlib.util, sys
absent = ("torch", "transformers", "peft", "accelerate")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in absent else found(name, package)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(BLOCKED)
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(environment: dict[str, str], cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_convert", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_every_kind_of_job(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """From a `.pth` to its parts and, its LoRA merged, to whole models; to every layout and back, verified in full."""
    source, bases = tiny / "iter_2.pth", ("--llm", tiny / "llm")
    jobs = [
        ("pth", source, "--to", "xtuner", "-o", "xtuner"),
        ("pth", source, "--to", "official", "--part", "projector", "-o", "projector"),
        ("pth", source, "--to", "hf", "--part", "llm", "-o", "llm", *bases),
        ("hf", "llm", "--to", "gguf", "-o", "gguf", "--outtype", "q8_0"),
        ("gguf", "gguf", "--to", "hf", "--dequantize", "-o", "back"),
        ("inspect", source),
        ("verify", source, "llm"),
        ("verify", "llm", "gguf"),
        *(("pth", source, "--to", "hf", "--dtype", dtype, "-o", dtype) for dtype in ("float16", "bfloat16", "float32")),
        ("pth", source, "--to", "official", "-o", "official"),
        ("pth", source, "--to", "gguf", "-o", "merged", "--outtype", "q8_0"),
        *(("verify", source, out) for out in ("float16", "bfloat16", "float32", "official", "merged")),
    ]
    for job in jobs:
        full = ("--verify", "full") if "--to" in job else ()
        done = run(environment, tmp_path, *job, *full)
        assert done.returncode == 0, (job, done.stderr)
