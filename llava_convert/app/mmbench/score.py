"""xtuner's rule (0.1.23, tools/mmbench.py, eval_result): which answers are right, and the shares by ability."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llava_convert.app.mmbench.data import COPIES, Benchmark, Question

AVERAGE = "Average"
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
    "sketch_reasoning": "Sketch Reasoning",
    "scenery_building": "Scenery & Building",
    "food_clothes": "Food & Clothes",
    "historical_figure": "Historical Figure",
    "traditional_show": "Traditional Show",
    "calligraphy_painting": "Calligraphy Painting",
    "cultural_relic": "Cultural Relic",
}
_CHOICE = re.compile(r"[A-D]+")


def choice(answer: str) -> str:
    """The letter that an answer gives, "" where it gives none. Of `AB` both, which is then wrong."""
    found = _CHOICE.search(answer)
    return found[0] if found else ""


def hits(benchmark: Benchmark, answers: Mapping[int, str]) -> dict[int, bool]:
    """By the index of each original question, whether it and all of its circular copies were answered right."""
    right: dict[int, bool] = {}
    for question in benchmark.questions:
        original = question.index % COPIES
        right[original] = right.get(original, True) and choice(answers[question.index]) == question.answer
    return {q.index: right[q.index] for q in benchmark.questions if q.index < COPIES}


def scores(benchmark: Benchmark, answers: Mapping[int, str]) -> dict[str, float]:
    """The share of right questions, overall and by ability; by category where the file has no abilities."""
    found = hits(benchmark, answers)
    mains = [q for q in benchmark.questions if q.index in found]
    names = {q.index: q.ability if benchmark.has_abilities else q.category for q in mains}
    result = {AVERAGE: _share(found[q.index] for q in mains)}
    for name in sorted(set(names.values())):
        result[ABBREVIATIONS.get(name, name)] = _share(found[i] for i in names if names[i] == name)
    return result


def _share(right: Iterable[bool]) -> float:
    every = list(right)
    return sum(every) / len(every) if every else 0.0


def row(question: Question, answer: str) -> dict[str, object]:
    """A row of mmbench_result.xlsx, in xtuner's order of columns: what a TEST file is submitted by."""
    found: dict[str, object] = {"question": question.text, **question.options, "prediction": answer}
    found["category"] = question.category
    if question.ability is not None:
        found["l2-category"] = question.ability
    return {**found, "index": question.index, "split": None, "answer": question.answer}
