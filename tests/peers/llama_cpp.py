"""Build llama.cpp from the sources which the sdist of llama-cpp-python carries: two runtimes and the converter.

    src/                 llama.cpp as it is published: convert_hf_to_gguf.py, conversion/, gguf-py, tools
    runtime/stock/       libllama, libmtmd, llama-quantize, llama-mtmd-cli
    runtime/repaired/    the same with one line of libmtmd changed (REPAIR)
    binding/llama_cpp    llama-cpp-python's ctypes declarations of the two libraries

The stock runtime puts the class token of a LLaVA tower behind the patches, where positions and the rows taken from the
tower expect it in front. The repaired one exchanges the operands of that concatenation, so that a whole picture can
be compared with the model as it was trained. Only the standard library is used here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

SDIST = "llama-cpp-python==0.3.36"
STOCK, REPAIRED = "stock", "repaired"
REPAIR = (
    "tools/mtmd/models/llava.cpp",
    "ggml_concat(ctx0, inp, model.class_embedding, 1)",
    "ggml_concat(ctx0, model.class_embedding, inp, 1)",
)
TARGETS = ("llama", "mtmd", "llama-quantize", "llama-mtmd-cli")
# $ORIGIN lets a runtime be copied elsewhere. Nothing here downloads, serves or is tested.
OPTIONS = (
    "-GNinja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
IDENTITY = repr((SDIST, REPAIR, TARGETS, OPTIONS))


def make(venv: Path, python: Path) -> None:
    """Fetch, compile (five minutes on two cores) and keep what runs; object files and the sdist are removed.

    `python` is the environment's own: its pip fetches the sdist, and the wheels `cmake` and `ninja` lie beside it.
    """
    _require_compiler()
    work = venv / "work"
    work.mkdir()
    _fetch(python, work)
    src = venv / "src"
    sdist = next(work.glob("llama_cpp_python-*/"))
    (sdist / "vendor" / "llama.cpp").rename(src)
    (sdist / "llama_cpp").rename(_made(venv / "binding") / "llama_cpp")
    path, old, new = REPAIR
    published = (src / path).read_text(encoding="utf-8")
    if published.count(old) != 1:
        raise SystemExit(f"{src / path}: the line to repair is not there once; REPAIR was written for {SDIST}")
    tools = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
    cmake = str(python.with_name("cmake"))
    subprocess.run([cmake, "-S", src, "-B", work / "build", *OPTIONS], check=True, env=tools, stdout=subprocess.DEVNULL)
    compiling = [cmake, "--build", work / "build", "--target"]
    subprocess.run([*compiling, *TARGETS], check=True, env=tools, stdout=subprocess.DEVNULL)
    _keep(work / "build" / "bin", venv / "runtime" / STOCK)
    try:
        (src / path).write_text(published.replace(old, new), encoding="utf-8")
        subprocess.run([*compiling, "mtmd"], check=True, env=tools, stdout=subprocess.DEVNULL)
    finally:
        (src / path).write_text(published, encoding="utf-8")
    _keep(work / "build" / "bin", venv / "runtime" / REPAIRED)
    shutil.rmtree(work)


def _require_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in names):
        raise SystemExit(
            f"llama.cpp is compiled here and none of {', '.join(names)} is on the PATH: install a C++17 compiler "
            "(Debian and Ubuntu: apt install g++), or set CXX to yours"
        )


def _fetch(python: Path, work: Path) -> None:
    # pip asks the package for its metadata even with --no-deps, which runs its build backend but compiles nothing.
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--dest", work, SDIST]
    subprocess.run([str(word) for word in command], check=True)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _keep(built: Path, runtime: Path) -> None:
    """The shared objects, with their links, and the two programs."""
    _made(runtime)
    names = [*built.glob("lib*"), *built.glob("*.dll"), *built.glob("llama-quantize*"), *built.glob("llama-mtmd-cli*")]
    for file in names:
        shutil.copy2(file, runtime / file.name, follow_symlinks=False)
