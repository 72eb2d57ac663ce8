"""Conversions in an environment of other versions: the lowest that pyproject.toml allows, or another Python.

    python tests/lowest.py                      the lowest versions: `make test-lowest`
    python tests/lowest.py --python python3.13  the versions of constraints.txt under another Python: `make test-python`

Neither has torch, transformers, peft or accelerate, which converting does not need. The proof is the manifest: every
file of every golden conversion has the same bytes as in the usual environment. Then each command's help, an inspection
and a verification are run. The unit tests are not: they use the newest interfaces of the libraries that they compare
with.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "fixtures" / "tiny"
TRAINING = ("torch", "transformers", "peft")  # and not for converting
KERNELS, COMPILER = "xllamacpp", "llvmlite"  # K-quants are in the manifest
COMMANDS = ("pth", "xtuner", "official", "hf", "gguf", "convert", "inspect", "verify", "layouts", "upload", "release")


def dependencies() -> dict[str, str]:
    """The lowest version of each, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    compiler = [one for one in project["optional-dependencies"]["llamacpp"] if one.startswith(COMPILER)]
    for dependency in [*project["dependencies"], *compiler]:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", dependency)
        if match is None:
            raise SystemExit(f"pyproject.toml: {dependency!r} has no lower bound that this understands")
        if match[1] not in TRAINING:
            found[match[1]] = match[2]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="another Python, with the versions of constraints.txt")
    asked = parser.parse_args()
    constraints = ["-c", str(ROOT / "constraints.txt")]
    wanted = list(dependencies()) if asked.python else [f"{name}=={v}" for name, v in dependencies().items()]
    folder = ROOT / ".venvs" / (Path(asked.python).name if asked.python else "lowest")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([asked.python or sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted, *(constraints if asked.python else [])], check=True)
    subprocess.run([*pip, "--no-deps", KERNELS, *constraints], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str | Path) -> None:
        done = subprocess.run(
            [str(python), "-m", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}{done.stderr}")

    run("tests.golden.manifest")
    for command in COMMANDS:
        run("llava_convert", command, "--help")
    with tempfile.TemporaryDirectory() as scratch:
        for to in ("official", "hf", "xtuner", "gguf"):
            out = Path(scratch) / to
            run("llava_convert", "convert", TINY / "iter_2.pth", "--to", to, "-o", out, "--verify", "full")
            run("llava_convert", "inspect", out)
            run("llava_convert", "verify", TINY / "iter_2.pth", out)
    version = subprocess.run([str(python), "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{version}, {', '.join(wanted)}: the same bytes, and every command runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
