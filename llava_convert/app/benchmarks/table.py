"""The results table: one row of scores under the headings that LLaVA models are published with, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from llava_convert.core.values import dataclass

# Headings of LLaVA-Llama-3-8B's table, each with lmms-eval's tasks and metrics (0.7.3) that it is made of.
COLUMNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "MMBench Test (EN)": (("mmbench_en_test", "submission"),),
    "MMBench Test (CN)": (("mmbench_cn_test", "submission"),),
    "CCBench Dev": (("mmbench_cn_cc", "gpt_eval_score"),),
    "MMMU Val": (("mmmu_val", "mmmu_acc"),),
    "SEED-IMG": (("seedbench", "seed_image"),),
    "AI2D Test": (("ai2d", "exact_match"),),
    "ScienceQA Test": (("scienceqa_img", "exact_match"),),
    "HallusionBench aAcc": (("hallusion_bench_image", "aAcc"),),
    "POPE": (("pope", "pope_f1_score"),),
    "GQA": (("gqa", "exact_match"),),
    "TextVQA": (("textvqa_val", "exact_match"),),
    "MME": (("mme", "mme_perception_score"), ("mme", "mme_cognition_score")),
    "MMStar": (("mmstar", "average"),),
}


@dataclass(frozen=True)
class Score:
    """One number: lmms-eval's task and metric, and the value."""

    task: str
    metric: str
    value: float


def scores(results: Mapping[str, Any]) -> tuple[Score, ...]:
    """Every number in lmms-eval's results; standard errors and aliases aside."""
    return tuple(_scores(results))


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric = key.partition(",")[0]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and "_stderr" not in metric and metric not in ("samples", "n_samples"):
                yield Score(task, metric, float(value))


def as_csv(name: str, found: tuple[Score, ...]) -> str:
    """model, task, metric, value: a line a number."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "task", "metric", "value"])
    writer.writerows([name, one.task, one.metric, repr(one.value)] for one in found)
    return buffer.getvalue()


def as_markdown(name: str, found: tuple[Score, ...]) -> str:
    """A table of one row: the published headings, and those of other tasks by their own names."""
    left, cells = {(one.task, one.metric): one.value for one in found}, {}
    for heading, parts in COLUMNS.items():
        values = [left.pop(part) for part in parts if part in left]
        if values:
            cells[heading] = "/".join(_shown(value) for value in values)
    cells |= {f"{task} {metric}": _shown(value) for (task, metric), value in left.items()}
    heads = ["Model", *cells]
    return "\n".join(
        (f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), f"| {' | '.join((name, *cells.values()))} |")
    )


def _shown(value: float) -> str:
    """Shares as percents with one digit, as they are published; sums as whole numbers."""
    return f"{value:.0f}" if value > 100 else f"{100 * value:.1f}" if value <= 1 else f"{value:.1f}"
