"""`eval TASKS --report`: the scores, and the first questions with their pictures and answers."""

from __future__ import annotations

from collections.abc import Sequence

from llava_convert.app.benchmarks.lmms import Asked
from llava_convert.app.benchmarks.table import Score
from llava_convert.app.pages.html import cards, page, paragraph, picture, preformatted, section, table, text

MOST = 200  # questions in a page


def tasks_page(name: str, scores: Sequence[Score], asked: Sequence[Asked], origin: str) -> str:
    """The page of a run. `origin` is the finished part about where the model comes from."""
    rows = [(text(one.task), text(one.metric), f"{one.value:.4g}") for one in scores]
    first = f"the first {len(asked)}" if len(asked) == MOST else f"all {len(asked)}"
    return page(
        f"lmms-eval: {name}",
        section("Scores", table(("task", "metric", "value"), rows)),
        section("Questions and answers", paragraph(first, "soft"), cards(map(_card, asked))) if asked else "",
        origin,
    )


def _card(one: Asked) -> str:
    shown = "".join(picture(each, one.task) for each in one.pictures)
    return shown + paragraph(one.task, "label") + preformatted(one.text) + paragraph(one.answer)
