"""Memory by the size of a model: the same widths and vocabulary at every size, more layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.jobs import GB, Row, convert
from benchmarks.make import made, make_official, make_pth
from benchmarks.measure import discard, quiesce
from benchmarks.shapes import deep_shape_for
from benchmarks.shares import FORMS, make_shares

REPEATS = 3
GROWTH = 1.1
"""How much more memory the largest model may take than the smallest."""
JOBS = {
    "memory rename official-hf": (make_official, ("F16", deep_shape_for)),
    "memory pth32-hf": (make_pth, ("F32", deep_shape_for)),
    "memory pth16-hf": (make_pth, ("BF16", deep_shape_for)),
    **{f"memory distcp-{form}-hf": (make_shares, (form,)) for form in FORMS},
}


def planned(names: Sequence[str], sizes: Sequence[float], cache: Path) -> list[tuple[str, Callable[[], list[Row]]]]:
    """A step for each job, which runs at all sizes and leaves no model behind."""
    if "memory" not in names:
        return []
    return [(name, lambda name=name: grown(name, sizes, cache)) for name in JOBS]  # type: ignore[misc]


def grown(name: str, sizes: Sequence[float], cache: Path) -> list[Row]:
    """Three runs at each size. The median of the peaks of the largest is compared with that of the smallest.

    A single peak says little: what the allocator keeps differs by up to 15 MB from run to run.
    """
    make, more = JOBS[name]
    rows: list[Row] = []
    # To save a model in safetensors takes its size twice, which is no matter of ours.
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2.2 if more == ("hf-columns",) else float("inf")
    for size in sorted(size for size in sizes if size * GB < most):
        folder = made(cache / f"{name.replace(' ', '-')}-{size:g}", make, int(size * GB), *more)
        source, options = _source(make, folder)
        out = cache / "work"
        discard(out)
        runs = []
        for _ in range(REPEATS):
            quiesce()
            runs.append(convert(source, "hf", out, options))
            discard(out)
        discard(folder)
        least = rows[0].ours if rows else runs
        factors = {
            "anonymous": median(r.anonymous for r in runs) / median(r.anonymous for r in least),
            "resident": median(r.resident for r in runs) / median(r.resident for r in least),
        }
        over = (f"{what} memory is {by:.2f} of the smallest's" for what, by in factors.items() if by > GROWTH)
        rows.append(Row(name, size, tuple(runs), notes=tuple(f"{note}, over {GROWTH}" for note in over)))
    return rows


def _source(make: Any, folder: Path) -> tuple[Path, list[str | Path]]:
    if make is make_pth:
        return folder / "iter_1.pth", []
    tower: list[str | Path] = ["--visual-encoder", folder / "tower"]
    if make is make_official:
        return folder, tower
    return folder / "saved", ["--config-from", folder / "config", *tower]
