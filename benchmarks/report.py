"""The table, and the same as JSON. Nothing here fails a build: a shared machine's times are no test."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.jobs import ANONYMOUS, Row
from benchmarks.measure import MB


def figures(row: Row) -> list[float]:
    """What the budget is about: ratios of pairs run one after the other, or seconds."""
    if not row.theirs:
        return [r.seconds for r in row.ours]
    return [mine.seconds / other.seconds for mine, other in zip(row.ours, row.theirs, strict=True)]


def verdict(row: Row) -> str:
    over = []
    if row.budget is not None and median(figures(row)) > row.budget:
        over.append("time")
    if max(r.anonymous for r in row.ours) > ANONYMOUS:
        over.append("memory")
    over += [note for note in row.notes if note == "imports torch" or "over" in note]
    return "over: " + ", ".join(over) if over else "ok"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        asdict(row)
        | {
            "median": median(figures(row)),
            "least": min(figures(row)),
            "most": max(figures(row)),
            "anonymous": max(r.anonymous for r in row.ours),
            "resident": max(r.resident for r in row.ours),
            "verdict": verdict(row),
        }
        for row in rows
    ]


def growth(rows: list[Row]) -> list[str]:
    """How peak anonymous memory grows from the smallest model to the largest, a job."""
    said = []
    for job in dict.fromkeys(row.job for row in rows):
        peaks = {row.size: max(r.anonymous for r in row.ours) / MB for row in rows if row.job == job}
        if len(peaks) > 1:
            said.append(f"{job}: anonymous memory " + ", ".join(f"{p:.0f} MB at {s:g} GB" for s, p in peaks.items()))
    return said


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="median (least–most) of pairs run one after the other")
    for name, side in (
        ("job", "left"),
        ("GB", "right"),
        ("ours s", "right"),
        ("user s", "right"),
        ("sys s", "right"),
        ("theirs s", "right"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for name in ("figure", "budget", f"anonymous MB (≤ {ANONYMOUS / MB:.0f})", "peak RSS MB"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in rows:
        found = figures(row)
        unit = f" × {row.yardstick}" if row.theirs else " s"
        table.add_row(
            row.job,
            f"{row.size:g}" if row.size else "",
            f"{median(r.seconds for r in row.ours):.2f}",
            f"{median(r.user for r in row.ours):.2f}",
            f"{median(r.system for r in row.ours):.2f}",
            f"{median(r.seconds for r in row.theirs):.2f}" if row.theirs else "",
            f"{median(found):.2f} ({min(found):.2f}–{max(found):.2f}){unit}",
            f"{row.budget:g}" if row.budget is not None else "",
            f"{max(r.anonymous for r in row.ours) / MB:.0f}",
            f"{max(r.resident for r in row.ours) / MB:.0f}",
            verdict(row),
        )
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.job} {row.size:g} GB: {note}")
    for line in growth(rows):
        console.print(line)
