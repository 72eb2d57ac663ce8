"""`merge` beside peft's `merge_and_unload` and axolotl's merge by shards: one base, one adapter, one sitting."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.jobs import Row, convert
from benchmarks.make import Values, made, make_official, write_json, write_safetensors
from benchmarks.measure import CLI, Run, discard, quiesce, run, warm
from benchmarks.shapes import Shapes

ROOT = Path(__file__).resolve().parent.parent
AXOLOTL = ROOT / ".venvs" / "axolotl" / "bin" / "python"
PEERS = {
    "peft": (Path(sys.executable), ROOT / "benchmarks" / "merge_by_peft.py"),
    "axolotl": (AXOLOTL, ROOT / "benchmarks" / "merge_by_axolotl.py"),
}
ADAPTERS = {"axolotl": "adapter-classic"}
RANK, ALPHA = 64, 128
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = 512


def make_base(folder: Path, nbytes: int) -> None:
    """`model`, a LLaVA of transformers in bfloat16, and `adapter`, LoRA on all linears of its language model.

    `adapter-classic` is the same under the names that are stored. axolotl applies nothing of one with the names that
    peft saves today: it says so in its log, and writes the base.
    """
    official = folder / "official"
    official.mkdir()
    make_official(official, nbytes, "BF16")
    convert(official, "hf", folder / "model", ["--visual-encoder", official / "tower"])
    discard(official)
    config = {
        "base_model_name_or_path": str(folder / "model"),
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": rf".*language_model.*\.({'|'.join(LINEARS)})",
    }
    for kind, spelt in (("adapter", live), ("adapter-classic", stored)):
        shapes: Shapes = {}
        for name, (rows, columns) in adapted(folder / "model").items():
            module = f"base_model.model.{spelt(name)}"
            shapes |= {f"{module}.lora_A.weight": (RANK, columns), f"{module}.lora_B.weight": (rows, RANK)}
        (folder / kind).mkdir()
        write_safetensors(folder / kind / "adapter_model.safetensors", shapes, "F32", Values("F32"))
        write_json(folder / kind / "adapter_config.json", config)


def adapted(folder: Path) -> dict[str, tuple[int, int]]:
    """Name and shape of each weight that the adapter changes."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                if "language_model" in name and name.split(".")[-2] in LINEARS:
                    rows, columns = tensors.get_slice(name).get_shape()
                    found[name] = (rows, columns)
    return found


def stored(name: str) -> str:
    """The module of a stored weight by its own name, which is that of memory too until transformers 4.51."""
    return name.removesuffix(".weight")


def live(name: str) -> str:
    """The module of a stored weight, as releases of transformers from 4.52 on call it in memory."""
    return stored(name).replace("language_model.model.", "model.language_model.")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its live name, which writers spell otherwise on the disk; memory is that of the page cache."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {live(name): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def nearest(exact: np.ndarray) -> np.ndarray:
    """Float64 values rounded once to bfloat16, nearest even: 8 significant bits of 53 are kept."""
    bits = exact.view(np.uint64)
    half = np.uint64((1 << 44) - 1)
    bits = (bits + half + ((bits >> np.uint64(45)) & np.uint64(1))) >> np.uint64(45) << np.uint64(45)
    return bits.view(np.float64)


def misrounded(base: Path, adapter: Path, out: Path) -> tuple[int, int]:
    """Of the adapted weights' elements, those that are not the exact merge rounded once, and all."""
    weights, merged = read(base), read(out)
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
        factors = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    wrong = count = 0
    for name in adapted(base):
        module = live(name)
        a, b = (factors[f"base_model.model.{module}.lora_{kind}.weight"].astype(np.float64) for kind in "AB")
        weight, found = weights[module], merged[module]
        for at in range(0, len(weight), ROWS):
            exact = weight[at : at + ROWS].double().numpy() + ALPHA / RANK * (b[at : at + ROWS] @ a)
            wrong += int((nearest(exact) != found[at : at + ROWS].double().numpy()).sum())
        count += weight.numel()
    return wrong, count


def compare(size: float, repeats: int, cache: Path) -> list[Row]:
    """Each peer and ours in turn, `repeats` times, from a source in the page cache."""
    folder = made(cache / f"merge-{size:g}", make_base, int(size * 10**9))
    base, adapter, work = folder / "model", folder / "adapter", cache / "work"
    names = [name for name, command in PEERS.items() if command[0].exists()]
    discard(work)
    work.mkdir()
    warm([*base.glob("*.safetensors"), adapter / "adapter_model.safetensors"])
    theirs: dict[str, list[Run]] = {name: [] for name in names}
    ours: list[Run] = []
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(repeats):
        for name in [*names, "ours"]:
            quiesce()
            out = work / name
            if name == "ours":
                ours.append(run([*CLI, "merge", base, adapter, "-o", out, "--quiet"], work=work))
            else:
                command = [*PEERS[name], base, folder / ADAPTERS.get(name, "adapter"), out]
                theirs[name].append(run(command, work=work))
            if name not in counts:
                counts[name] = misrounded(base, adapter, out)
            discard(out)
    discard(work)
    return [_row(name, size, ours, theirs[name], counts) for name in names]


def _row(name: str, size: float, ours: list[Run], theirs: list[Run], counts: dict[str, tuple[int, int]]) -> Row:
    memory = [max(run.resident for run in runs) / 1e6 for runs in (ours, theirs)]
    share = {who: f"{wrong} of {count} ({wrong / count:.2%})" for who, (wrong, count) in counts.items()}
    notes = (
        f"peak RSS {memory[0]:.0f} MB, theirs {memory[1]:.0f} MB",
        f"misrounded elements: {share['ours']}, theirs {share[name]}",
    )
    what = f"LoRA of rank {RANK} merged into hf"
    return Row(f"merge-{name}", size, tuple(ours), name, tuple(theirs), None, notes, what)


def missing() -> str:
    """What to say when axolotl is not here; empty when it is."""
    return "" if AXOLOTL.exists() else "axolotl is left out: `make peers` builds its environment"


def planned(
    names: list[str], sizes: list[float], repeats: int, cache: Path
) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What to run, in order, each with its name."""
    if "merge" not in names:
        return []
    return [(f"merge {size:g} GB", lambda size=size: compare(size, repeats, cache)) for size in sizes]  # type: ignore[misc]
