"""MMBench's TSV files as tests make them: drawn pictures, circular copies, pictures named by another row."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image")
COPIES = 1_000_000


def picture(number: int, size: tuple[int, int] = (80, 56)) -> str:
    """A drawn picture in base64, another one for each number."""
    drawn = Image.new("RGB", size, (40 * number % 256, 90, 200 - 30 * number % 200))
    ImageDraw.Draw(drawn).ellipse((8 + 3 * number % 30, 8, 40, 44), fill=(250, 60 * number % 256, 30))
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def questions() -> list[dict[str, object]]:
    """Six questions; the first has three circular copies, which name its row for the picture."""
    names = ("attribute_reasoning", "coarse_perception", "finegrained_perception (cross-instance)")
    texts = ("What is it?", "Which colour?", "图中有什么？", "Where is it?", "How many?", "Which shape?")
    rows: list[dict[str, object]] = []
    for number, text in enumerate(texts):
        options = ["a sun", "hills", "None", "7"] if number == 0 else [f"thing {number}", "a sun", "", ""]
        for turn in range(4 if number == 0 else 1):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": number + turn * COPIES,
                    "question": text,
                    "hint": "Look closely." if number % 2 else "",
                    **dict(zip("ABCD", turned, strict=True)),
                    "answer": "ABCD"[(number + turn) % 2],
                    "category": f"kind {number % 2}",
                    "l2-category": names[number % 3],
                    "image": picture(number) if turn == 0 else "0",
                }
            )
    return rows
