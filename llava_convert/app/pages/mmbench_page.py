"""`eval mmbench --report` and `eval compare`: scores, and the pictures with their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.app.mmbench.data import Benchmark, Question
from llava_convert.app.mmbench.score import choice, scores
from llava_convert.app.pages.html import cards, page, paragraph, picture, section, table, text

_MOST = 200  # pictures in a page
_WORDS = {"out": "answers in", "resumed": "answers of an earlier run"}


def mmbench_page(benchmark: Benchmark, answers: Mapping[int, str], about: Mapping[str, Any], origin: str = "") -> str:
    """The page of one run; wrong answers first. `origin` is the finished part about where the model comes from."""
    asked = sorted(benchmark.questions, key=lambda q: choice(answers[q.index]) == q.answer)
    left = f"{len(asked) - _MOST:,} more questions are in the worksheet" if len(asked) > _MOST else ""
    return page(
        f"{benchmark.path.name}: {about['source']}",
        section("What was run", table((), [(text(_WORDS.get(key, key)), text(value)) for key, value in about.items()])),
        section("Scores", _scores(benchmark, {"": answers})),
        section("Answers", cards(_card(benchmark, q, {"": answers[q.index]}) for q in asked[:_MOST])),
        paragraph(left, "soft") if left else "",
        origin,
    )


def compare_page(benchmark: Benchmark, sides: Mapping[str, Mapping[int, str]], origin: str = "") -> tuple[str, int]:
    """The page of the questions that two runs answer otherwise, and how many these are.

    `origin` is the finished part about where the two models come from.
    """
    first, second = sides.values()
    changed = [q for q in benchmark.questions if first[q.index] != second[q.index]]
    shown = cards(_card(benchmark, q, {name: each[q.index] for name, each in sides.items()}) for q in changed[:_MOST])
    said = f"{len(changed)} of {len(benchmark.questions)} answers differ"
    return (
        page(
            f"{benchmark.path.name}: {' and '.join(sides)}",
            paragraph(said, "bad" if changed else "good"),
            section("Scores", _scores(benchmark, sides)),
            section("Answers that changed", shown),
            origin,
        ),
        len(changed),
    )


def _scores(benchmark: Benchmark, sides: Mapping[str, Mapping[int, str]]) -> str:
    if not benchmark.has_answers:
        return ""
    found = {name: scores(benchmark, answers) for name, answers in sides.items()}
    names = list(next(iter(found.values())))
    rows = [(text(name), *(f"{100 * each[name]:.1f} %" for each in found.values())) for name in names]
    return table(("category", *(name or "score" for name in sides)), rows)


def _card(benchmark: Benchmark, question: Question, answers: Mapping[str, str]) -> str:
    asked = question.prompt.partition("\n")[2].rpartition("\n")[0]
    parts = [picture(benchmark.picture(question), str(question.text)), f"<pre>{text(asked)}</pre>"]
    for name, answer in answers.items():
        right = choice(answer) == question.answer
        kind = "" if question.answer is None else "good" if right else "bad"
        mark = {"good": "✓ ", "bad": "✗ "}.get(kind, "")
        parts += [paragraph(name, "label")] if name else []
        parts.append(paragraph(mark + answer, kind))
    if question.answer is not None:
        parts.append(paragraph(f"right: {question.answer}", "soft"))
    return "".join(parts)
