"""The wheel, as a user installs it: one top-level module, its tables inside, and a command that converts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "dist", "demo-out", "site", ".bench"
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` with the hatchling of this environment: no isolation, so no network."""
    run(PYTHON, "-m", "hatchling", "build", "--target", kind, "--directory", out, cwd=source)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(PYTHON, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, CHECKOUT, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv that holds the wheel and nothing of this checkout; its dependencies are those of the running environment.

    `--system-site-packages` would show the packages of the base interpreter, not those of a venv. So the wheel goes in
    a new venv without dependencies, and a .pth file appends this environment's site-packages to its path. What is
    appended comes last, and .pth files in it (such as that of an editable install of this project) are not followed.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars=variables))
    dependencies = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(dependencies)) + "\n")
    scripts = Path(sysconfig.get_path("scripts", scheme="venv", vars=variables))
    python = scripts / Path(PYTHON).name
    # pip is found through the .pth file as well; --ignore-installed, since it may see the editable install there
    options = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    run(python, "-m", "pip", "install", *options, wheel, cwd=folder)
    return scripts


def test_the_wheel_brings_one_top_level_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert top == {"llava_convert", f"llava_convert-{version}.dist-info"}


def test_the_wheel_carries_every_mapping_and_recipe_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    for data in ("mappings", "training"):
        files = [path for path in (CHECKOUT / data).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        wanted = {f"llava_convert/{path.relative_to(CHECKOUT).as_posix()}" for path in files}
        assert wanted <= inside, sorted(wanted - inside)
    assert "llava_convert/mappings/layouts/hf.toml" in inside
    assert "llava_convert/py.typed" in inside


def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(CHECKOUT, copy, ignore=IGNORED)
    here = build("wheel", copy, tmp_path / "from-checkout")
    sdist = build("sdist", copy, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    there = build("wheel", unpacked, tmp_path / "from-sdist")
    assert there.read_bytes() == here.read_bytes()


def test_the_installed_package_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    code = (
        "import llava_convert as p, llava_convert.core.resources as r; print(p.__file__); print(r.data_dir('mappings'))"
    )
    package, mappings = map(Path, run(installed / Path(PYTHON).name, "-c", code, cwd=tmp_path).splitlines())
    assert installed.parent in package.parents
    assert mappings == package.parent / "mappings"


def test_the_installed_command_converts(installed: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    run(installed / "llava-convert", "pth", tiny / "iter_2.pth", "--to", "hf", "-o", out, cwd=tmp_path)
    assert (out / "model.safetensors").is_file()
    assert (out / "config.json").is_file()
    run(installed / "llava-convert", "verify", tiny / "iter_2.pth", out, cwd=tmp_path)
