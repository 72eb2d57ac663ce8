"""The table, and the same as JSON. Nothing here fails a build: a shared machine's times are no test."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.jobs import ANONYMOUS, Row
from benchmarks.measure import MB, Run


def figures(row: Row) -> list[float]:
    """What the budget is about: ratios of pairs run one after the other, or seconds."""
    if not row.theirs:
        return [r.seconds for r in row.ours]
    return [mine.seconds / other.seconds for mine, other in zip(row.ours, row.theirs, strict=True)]


def _above(row: Row) -> list[float]:
    """By how many seconds each run took more than its budget."""
    budget = row.budget or 0.0
    if not row.theirs:
        return [r.seconds - budget for r in row.ours]
    pairs = zip(row.ours, row.theirs, strict=True)
    return [mine.seconds - budget * other.seconds - row.grace for mine, other in pairs]


def verdict(row: Row) -> str:
    over = []
    if row.budget is not None and median(_above(row)) > 0:
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


def markdown(rows: list[Row]) -> str:
    """A table of peers: medians, peaks, and verdicts; programs that were given the same job are together."""
    head = ("job", "GB", "program", "seconds", "processor, s", "peak memory, MB", "temporary disk, MB", "budget")
    lines = [head, ("---", "---:", "---", *("---:",) * 4, "---")]
    for at, row in enumerate(rows):
        if not row.what:
            continue
        size = f"{row.size:g}"
        lines.append((row.what, size, row.yardstick, *_cells(row.theirs), ""))
        if at + 1 == len(rows) or rows[at + 1].ours != row.ours:
            budget = f" of {row.budget:.2f}" if row.budget is not None else ""
            said = f"{verdict(row)} (time {median(figures(row)):.2f}{budget})" if budget else verdict(row)
            lines.append((row.what, size, "**llava-convert**", *_cells(row.ours), said))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cells(runs: tuple[Run, ...]) -> tuple[str, str, str, str]:
    return (
        f"{median(r.seconds for r in runs):.1f}",
        f"{median(r.user + r.system for r in runs):.1f}",
        f"{max(r.resident for r in runs) / MB:.0f}",
        f"{max(r.temporary for r in runs) / MB:.0f}",
    )


def growth(rows: list[Row]) -> list[str]:
    """How peak anonymous memory grows from the smallest model to the largest, a job."""
    said = []
    for job in dict.fromkeys(row.job for row in rows):
        peaks = {row.size: median(r.anonymous for r in row.ours) / MB for row in rows if row.job == job}
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
            f"{row.budget:g}{f' + {row.grace:g} s' if row.grace else ''}" if row.budget is not None else "",
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
