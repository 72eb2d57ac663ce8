"""What a run says of itself: JSON lines, lines for people, the loss as a picture, and accelerate's trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from .disk import unwritten

FILE, CURVE = "log.jsonl", "loss.png"
SCALARS = ("lr", "grad_norm", "loss", "time")


class Log:
    """The log of one run in `folder`; what an earlier part of the run wrote is kept up to iteration `start`.

    Only the process that writes checkpoints has one. A line an iteration: iter, loss, lr, grad_norm (null between two
    steps of the optimiser), time (seconds of the iteration), eta (seconds left).
    """

    def __init__(self, folder: Path, iterations: int, start: int, every: int) -> None:
        self.folder, self.iterations, self.start, self.every = folder, iterations, start, every
        path = folder / FILE
        self.rows = [row for row in whole_rows(path) if row["iter"] <= start] if start else []
        self.file = path.open("w", encoding="utf-8")
        self.file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def add(self, iteration: int, values: Mapping[str, float | None]) -> None:
        """Log an iteration, counted from 1."""
        done = [row["time"] for row in self.rows[-50:]]
        eta = (self.iterations - iteration) * sum([*done, values["time"] or 0.0]) / (len(done) + 1)
        row = {"iter": iteration, **values, "eta": round(eta, 1)}
        self.rows.append(row)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as problem:
            raise unwritten(problem, self.folder / FILE) from None
        if iteration % self.every == 0 or iteration in (self.start + 1, self.iterations):
            left = timedelta(seconds=round(eta))
            print(
                f"iter {iteration}/{self.iterations}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  eta {left}",
                file=sys.stderr,
                flush=True,
            )

    @property
    def eta(self) -> float:
        return float(self.rows[-1]["eta"]) if self.rows else 0.0

    def scalars(self) -> dict[str, list[float]]:
        """Each scalar of every iteration, for the checkpoint's message_hub."""
        return {name: [float(row[name]) for row in self.rows if row.get(name) is not None] for name in SCALARS}

    def close(self) -> None:
        with suppress(OSError):  # a full disk was told of by then
            self.file.close()
        if not self.rows:
            return
        with suppress(OSError):
            draw_curve([(row["iter"], row["loss"]) for row in self.rows], self.folder / CURVE)


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an earlier log; the last may have been cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def draw_curve(points: list[tuple[int, float]], path: Path, *, size: tuple[int, int] = (900, 480)) -> None:
    """The loss over the iterations as a PNG: each value in grey, their running mean in blue, axes with numbers."""
    from PIL import Image, ImageDraw

    width, height = size
    left, right, top, bottom = 64, width - 16, 28, height - 40
    values = [loss for _, loss in points]
    low, high = min(values), max(values)
    low, high = (
        (low - 0.5, high + 0.5) if high - low < 1e-9 else (low - 0.05 * (high - low), high + 0.05 * (high - low))
    )
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place(iteration: float, loss: float) -> tuple[float, float]:
        return (
            left + (iteration - first) / (last - first) * (right - left),
            bottom - (loss - low) / (high - low) * (bottom - top),
        )

    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for step in range(6):
        loss, iteration = low + (high - low) * step / 5, first + (last - first) * step / 5
        y, x = place(first, loss)[1], place(iteration, low)[0]
        draw.line([(left, y), (right, y)], fill=(230, 230, 230))
        draw.text((8, y - 6), f"{loss:.3f}", fill="black")
        draw.text((x - 12, bottom + 8), f"{iteration:.0f}", fill="black")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    draw.text((left, 8), "training loss", fill="black")
    draw.text((right - 60, bottom + 22), "iteration", fill="black")
    draw.line([place(i, loss) for i, loss in points] * (len(points) > 1), fill=(190, 190, 190))
    mean, smooth = values[0], []
    for iteration, loss in points:
        mean += (loss - mean) * 0.1
        smooth.append(place(iteration, mean))
    draw.line(smooth * (len(smooth) > 1), fill=(30, 90, 200), width=3)
    picture.save(path)
