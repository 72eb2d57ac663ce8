"""Run the core tests with the lowest versions that pyproject.toml allows: `make test-lowest`.

torch alone is the one of constraints.txt: the core tests need it to make inputs, the package does not. Extras are left
out, so that the tests of hubs, stores, training and peers are, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venvs" / "lowest"
# The bare minimum to run them; hypothesis and xxhash are the tests' own.
TOOLS = ("pytest", "hypothesis", "xxhash", "jinja2", "pillow", "scipy")
CORE = ("core", "storage", "ops", "model", "engine", "layouts", "app", "cli")


def lowest() -> list[str]:
    """`name==version` of each dependency, torch apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for dependency in project["dependencies"]:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", dependency)
        if match is None:
            raise SystemExit(f"pyproject.toml: {dependency!r} has no lower bound that this understands")
        if match[1] != "torch":
            found.append(f"{match[1]}=={match[2]}")
    return found


def main() -> int:
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch.split(";")[0].strip()], check=True)
    subprocess.run([*pip, *lowest(), *TOOLS], check=True)
    folders = [f"tests/unit/{name}" for name in CORE if (ROOT / "tests" / "unit" / name).is_dir()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow and not peers", *folders, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
