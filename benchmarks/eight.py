"""`make bench-8b`: one conversion each of a LLaVA-Llama-3-8B at its real size, beside `cp` of the bytes that are read.

The weights are random. Sources and outputs are made and removed in turn, so that the disk holds one of each at most;
they are read from the disk, not from the page cache, by `cp` as by the conversion.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage

import torch
from rich.console import Console

from benchmarks import gguf_jobs
from benchmarks.hollow import fill, hollow, offset, where
from benchmarks.jobs import Row, convert
from benchmarks.make import make_bases, meta
from benchmarks.measure import CLI, RunError, cool, copy, discard, quiesce, run
from benchmarks.report import show
from benchmarks.shapes import LLAVA_8B, Shape, bytes_of, shape_for
from tests.zero_folders import Save, write

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
RANKS = 8
SPARE = 2 * GB  # left to whatever else writes to the disk meanwhile
SMALL_FILES = 10**8  # tokenizers and configs
TOWER = Path("vit", "model.safetensors")


class NoRoom(Exception):
    """The disk is too full for the next step."""


@dataclass(frozen=True)
class Form:
    """A kind of source: how its LLM is stored, and what its conversion may take, in times of `cp`.

    `make` writes it into a folder, and says which files are read; `path` is what the command is given. `meanwhile` is
    how many times its room it needs until it is made.
    """

    name: str
    llm_itemsize: int
    files: int
    budget: float
    make: Callable[[Path, Shape], list[Path]]
    targets: tuple[str, ...] = ("hf", "official")
    path: str = "iter_1.pth"
    meanwhile: int = 1

    def trained_bytes(self, shape: Shape) -> int:
        """Of the weights in the checkpoint, without its holes."""
        return bytes_of(shape.llm(), self.llm_itemsize) + bytes_of(shape.adapters(), 4)

    def source_bytes(self, shape: Shape) -> int:
        return (self.trained_bytes(shape) + bytes_of(shape.tower(), 4) + SMALL_FILES) * self.meanwhile

    def copy_bytes(self, shape: Shape) -> int:
        """Of the largest file: `copy` keeps one at a time."""
        return max(self.trained_bytes(shape) // self.files, bytes_of(shape.tower(), 4)) + SMALL_FILES

    def needs(self, shape: Shape) -> int:
        return self.source_bytes(shape) + max(self.copy_bytes(shape), output_bytes(shape))


def output_bytes(shape: Shape) -> int:
    """Of either layout: everything in 16 bits."""
    return bytes_of(shape.llm(), 2) + bytes_of(shape.tower(), 2) + bytes_of(shape.projector(), 2) + SMALL_FILES


def make_pth(folder: Path, shape: Shape) -> list[Path]:
    """One file: the LLM in bfloat16, the tower's LoRA and the projector in float32; and the tower."""
    config = make_bases(folder, shape)
    source = folder / "iter_1.pth"
    with hollow():
        state = OrderedDict((name, torch.empty(s)) for name, s in shape.adapters().items())
        state |= {f"llm.{name}": torch.empty(s, dtype=torch.bfloat16) for name, s in shape.llm().items()}
        torch.save({"meta": meta(config), "state_dict": state}, source)
    fill(source, lambda tree: tree["state_dict"].values())
    return [source, folder / TOWER]


def make_zero2(folder: Path, shape: Shape) -> list[Path]:
    """A folder of that name, as DeepSpeed's ZeRO-2 on eight ranks leaves it; and the tower.

    The float32 masters are there in full. What a conversion has no use for, the moments and the bfloat16 copy of the
    weights, are holes of the right size: they would take another 48 GB at least.
    """
    config = make_bases(folder, shape)
    source = folder / "iter_1.pth"
    with hollow():
        trained = {name: torch.empty(s) for name, s in shape.adapters().items()}
        trained |= {f"llm.{name}": torch.empty(s) for name, s in shape.llm().items()}
        save = Save(trained, stage=2, ranks=RANKS, meta=meta(config))
        write(source, save)
    shares = [source / save.optim_file(rank) for rank in range(RANKS)]
    for share in shares:
        fill(share, lambda tree: tree["optimizer_state_dict"]["single_partition_of_fp32_groups"])
        write_steps(share, float(save.step))
    return [*shares, folder / TOWER]


def write_steps(share: Path, step: float) -> None:
    """The count of updates, which is a tensor too and so a hole until now."""
    moments = where(share)["optimizer_state_dict"]["base_optimizer_state"]["state"]
    with share.open("r+b") as file:
        for moment in moments.values():
            file.seek(offset(moment["step"]))
            file.write(torch.tensor(step).numpy().tobytes())


def make_hf(folder: Path, shape: Shape) -> list[Path]:
    """All of it in bfloat16, in one file."""
    gguf_jobs.write_hf(folder, shape)
    return [folder / "model" / "model.safetensors"]


FORMS = {
    "pth": Form("pth", 2, 1, 1.1, make_pth),
    "zero2": Form("zero2", 4, RANKS, 1.1, make_zero2),
    "hf": Form("hf", 2, 1, 1.2, make_hf, ("gguf",), "model", 2),
}


TARGETS = ("hf", "official", "gguf")


def chosen_shape(scale: float, layers: int | None) -> Shape:
    """The 8B itself, or a smaller one: a part of its bytes, fewer of its layers, or both."""
    shape = LLAVA_8B
    if scale != 1:
        shape = shape_for(int(FORMS["pth"].source_bytes(LLAVA_8B) / scale), 2, 4)
    return shape if layers is None else replace(shape, layers=layers)


def fitting(form: Form, shape: Shape, room: int) -> Shape:
    """`shape`, with as many of its layers as there is room for. Raises NoRoom where not one fits."""
    for layers in range(shape.layers, 0, -1):
        fewer = replace(shape, layers=layers)
        if form.needs(fewer) + SPARE <= room:
            return fewer
    least = form.needs(replace(shape, layers=1)) + SPARE
    raise NoRoom(f"{form.name} needs {least / GB:.1f} GB with one layer, {room / GB:.1f} GB are free")


class Disk:
    """Says before each step how much it needs, and does not begin what there is no room for."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console

    @property
    def free(self) -> int:
        return disk_usage(self.folder).free

    def step(self, what: str, needs: int) -> None:
        """Raises NoRoom."""
        free = self.free
        self.console.print(f"{what} (needs {needs / GB:.1f} GB, {free / GB:.1f} GB free) …")
        if needs > free:
            raise NoRoom(f"{what}: needs {needs / GB:.1f} GB, {free / GB:.1f} GB are free")


def runs(form: Form, wanted: Shape, targets: list[str], disk: Disk, *, verify: bool, keep: bool) -> Iterator[Row]:
    """Make the source, convert it to each layout, and remove it."""
    shape = fitting(form, wanted, disk.free)
    notes: tuple[str, ...] = ()
    if shape != wanted:
        notes = (f"{shape.layers} of {wanted.layers} layers: the whole needs {form.needs(wanted) / GB:.0f} GB of disk",)
        disk.console.print(f"{form.name}: {notes[0]}")
    folder, work = disk.folder / form.name, disk.folder / "work"
    try:
        disk.step(f"{form.name}: make it, {shape.layers} layers", form.source_bytes(shape))
        folder.mkdir()
        files = form.make(folder, shape)
        read = sum(file.stat().st_blocks * 512 for file in files)
        for to in (to for to in targets if to in form.targets):
            work.mkdir()
            disk.step(f"{form.name}: cp of {read / GB:.1f} GB", form.copy_bytes(shape))
            quiesce()
            cool(files)
            theirs = copy(files, work / "copy", keep=False)
            disk.step(f"{form.name}: convert to {to}", output_bytes(shape))
            quiesce()
            cool(files)
            ours = convert(folder / form.path, to, work / "out", [])
            if verify:
                disk.step(f"{form.name}: verify {to}", 0)
                took = run([*CLI, "verify", folder / form.path, work / "out"])
                disk.console.print(f"  the same, said in {took.seconds:.1f} s")
            if keep:
                (work / "out").rename(folder / f"out-{to}")
            discard(work)
            yield Row(f"{form.name}-{to}", round(read / GB, 2), (ours,), "cp", (theirs,), form.budget, notes=notes)
    finally:
        discard(work)
        if not keep:
            discard(folder)


@contextmanager
def place(cache: Path, *, keep: bool) -> Iterator[Path]:
    """An empty folder, which goes at the end, whatever comes."""
    folder = cache.absolute() / "8b"
    discard(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if not keep:
            discard(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.eight", description=__doc__)
    parser.add_argument("--scale", type=float, default=1, help="divide the model's bytes by this")
    parser.add_argument("--layers", type=int, help="layers of the LLM; 32 is the 8B's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="what to convert")
    parser.add_argument("--to", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--verify", action="store_true", help="compare each output with its source, all of it")
    parser.add_argument("--keep", action="store_true", help="leave sources and outputs for a look")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="where the folder 8b is made")
    chosen = parser.parse_args()
    wanted = sum(to in FORMS[name].targets for name in chosen.forms for to in chosen.to)
    if not wanted:
        goes = "; ".join(f"{name} goes to {', '.join(FORMS[name].targets)}" for name in chosen.forms)
        parser.error(f"nothing to run: {goes}")
    console = Console(width=None if Console().is_terminal else 160)
    rows: list[Row] = []
    shape = chosen_shape(chosen.scale, chosen.layers)
    with place(chosen.cache, keep=chosen.keep) as folder:
        disk = Disk(folder, console)
        for name in chosen.forms:
            try:
                for row in runs(FORMS[name], shape, chosen.to, disk, verify=chosen.verify, keep=chosen.keep):
                    rows.append(row)
            except (NoRoom, RunError) as problem:
                console.print(str(problem), markup=False)
    if rows:
        show(rows, console)
    sys.exit(len(rows) < wanted)


if __name__ == "__main__":
    main()
