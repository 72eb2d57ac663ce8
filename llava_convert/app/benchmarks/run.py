"""`eval TASKS SOURCE`: load the model, have lmms-eval put its questions, write the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.load import loaded
from llava_convert.app.benchmarks.lmms import Asked, evaluate
from llava_convert.app.benchmarks.table import Score, as_csv, as_markdown, scores
from llava_convert.app.pages.html import write
from llava_convert.app.pages.provenance_part import provenance_part
from llava_convert.app.pages.tasks_page import MOST, tasks_page
from llava_convert.app.provenance import Made, command_of, provenance_of
from llava_convert.core.errors import InputError, OutputError
from llava_convert.core.progress import Reporter, counted
from llava_convert.core.text import utf8
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from llava_convert.app.jobs.ask import EvalJob

CSV, RESULTS, CARD = "results.csv", "results.json", "README.md"
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


@dataclass(frozen=True)
class EvalResult:
    """What a run found: every number of every task, and the table of them."""

    source: str
    layout: str
    runtime: str
    folder: Path
    scores: tuple[Score, ...]
    table: str

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "layout": self.layout,
            "runtime": self.runtime,
            "out": str(self.folder),
            "scores": [dict(one.__dict__) for one in self.scores],
            "table": self.table,
        }


def run_tasks(job: EvalJob, say: Reporter) -> EvalResult:
    """Raises what loading and `evaluate` raise; InputError where the card that is to get the table does not exist."""
    card = _card(Path(job.source)) if job.card else None
    include = None if job.include is None else Path(job.include)
    asked: list[Asked] = []
    with loaded(job.source, job, say) as model:
        found = evaluate(
            model.runtime,
            job.names,
            include=include,
            limit=job.limit,
            advance=lambda total: counted(say, "answering", total),
            keep=lambda one: asked.append(one) if job.report is not None and len(asked) < MOST else None,
        )
        source, layout, runtime = str(model.checkpoint.path), model.checkpoint.layout, model.runtime.name
        origin = dict(provenance_of([model.checkpoint], model.session).rows()) if job.report is not None else {}
    every = scores(found["results"])
    name = Path(source).name
    folder = Path(job.work_dir) if job.work_dir is not None else Path("work_dirs") / f"{name}-eval"
    result = EvalResult(source, layout, runtime, folder, every, as_markdown(name, every))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CSV).write_bytes(utf8(as_csv(name, every)))
        about = {key: found[key] for key in ("results", "versions", "n-shot", "config") if key in found}
        (folder / RESULTS).write_bytes(utf8(json.dumps(about, indent=2, default=str, ensure_ascii=False) + "\n"))
        if card is not None:
            card.write_bytes(utf8(with_table(card.read_text(encoding="utf-8"), result.table)))
    except OSError as problem:
        raise OutputError(
            f"{folder}: {problem.strerror or problem}", hint="--work-dir takes another folder"
        ) from problem
    if job.report is not None:
        part = provenance_part({"model": origin}, Made.now(command_of("eval tasks", job)))
        write(Path(job.report), tasks_page(name, every, asked, part))
    return result


def _card(source: Path) -> Path:
    card = (source if source.is_dir() else source.parent) / CARD
    if not card.is_file():
        raise InputError(f"--card: {card} does not exist", hint="a conversion writes one; leave --card out")
    return card


def with_table(card: str, table: str) -> str:
    """The card with a section of scores, in the place of an earlier one."""
    section = f"{_BEGIN}\n## Evaluation\n\n{table}\n\nBy lmms-eval, with `llava-convert eval tasks`.\n{_END}"
    head, begins, rest = card.partition(_BEGIN)
    if begins:
        return head + section + rest.partition(_END)[2]
    return f"{card.rstrip()}\n\n{section}\n"
