"""`eval mmbench`: put the questions to a model, keep each answer as it comes, score, write what is submitted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.load import Loaded, loaded
from llava_convert.app.ask.processes import Processes, processes
from llava_convert.app.mmbench.answers import Answers, forget
from llava_convert.app.mmbench.data import Benchmark, read_benchmark
from llava_convert.app.mmbench.score import row, scores
from llava_convert.app.pages.html import write
from llava_convert.app.pages.mmbench_page import mmbench_page
from llava_convert.app.pages.provenance_part import provenance_part
from llava_convert.app.provenance import Made, command_of, provenance_of
from llava_convert.core.errors import OutputError, UsageError
from llava_convert.core.progress import Reporter, Silence, counted
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass
from llava_convert.storage.fingerprints import identity

if TYPE_CHECKING:
    from llava_convert.app.jobs.ask import MMBenchJob

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # openpyxl's ILLEGAL_CHARACTERS_RE
XLSX, SCORES, ARGS = "mmbench_result.xlsx", "mmbench_result.json", "args.json"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class MMBenchResult:
    """The result of a run: `scores` by ability, Average first; None for a file without answers."""

    source: str
    layout: str
    runtime: str
    data: str
    folder: Path
    questions: int
    resumed: int
    scores: Mapping[str, float] | None

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "layout": self.layout,
            "runtime": self.runtime,
            "data": self.data,
            "out": str(self.folder),
            "questions": self.questions,
            "resumed": self.resumed,
            "scores": None if self.scores is None else dict(self.scores),
        }


def run_mmbench(job: MMBenchJob, say: Reporter) -> MMBenchResult:
    """Raises InputError for a broken file, OutputError for the answers of another run; what loading raises."""
    team = processes(cpu=job.device == "cpu")
    quiet = say if team.first else Silence()
    benchmark = read_benchmark(Path(job.data))
    folder = Path(job.work_dir) if job.work_dir is not None else Path("work_dirs") / benchmark.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    if job.force and team.first:
        forget(folder)
    team.wait()
    with loaded(job.source, job, quiet) as model:
        answers = Answers(folder, _about(job, model, benchmark), team.rank)
        team.wait()  # nobody writes before all have read
        resumed = len(answers.found)
        if resumed and team.first:
            say.note(f"{resumed} of {len(benchmark.questions)} questions were answered before: going on")
        with answers:
            _ask(benchmark, model, answers, team, quiet, job.max_new_tokens)
        team.wait()
        answers.reread()
        result = MMBenchResult(
            str(model.checkpoint.path), model.checkpoint.layout, model.runtime.name, str(benchmark.path), folder,
            len(benchmark.questions), resumed, scores(benchmark, answers.found) if benchmark.has_answers else None,
        )  # fmt: skip
        if team.first:
            model_of = dict(provenance_of([model.checkpoint], model.session).rows())
            made = Made.now(command_of("eval mmbench", job))
            _write(folder, benchmark, answers.found, result, job)
            _tell(folder, model_of, made)
            if job.report is not None:
                about = {key: value for key, value in result.as_json().items() if key != "scores"}
                part = provenance_part({"model": model_of}, made)
                write(Path(job.report), mmbench_page(benchmark, answers.found, about, part))
    return result


def _tell(folder: Path, model: Mapping[str, str], made: Made) -> None:
    """Where the answers come from, for who compares them later."""
    told = {"model": dict(model), "command": made.command, "date": made.date, "versions": dict(made.versions)}
    (folder / PROVENANCE).write_bytes(to_json(told))


def _ask(benchmark: Benchmark, model: Loaded, answers: Answers, team: Processes, say: Reporter, limit: int) -> None:
    left = [q for q in benchmark.questions if q.index not in answers.found][team.rank :: team.count]
    advance = counted(say, "answering", len(left))
    for question in left:
        message = {"role": "user", "content": question.prompt}
        answers.add(question.index, model.runtime.answer([message], [benchmark.picture(question)], limit=limit).text)
        advance(1)


def _about(job: MMBenchJob, model: Loaded, benchmark: Benchmark) -> dict[str, Any]:
    """What must be the same for a run to go on with the answers of another."""
    checkpoint = model.checkpoint
    with benchmark.path.open("rb") as stream:
        data = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "model": hashlib.sha256(json.dumps(identity(checkpoint.files)).encode()).hexdigest(),
        "data": data,
        "runtime": model.runtime.name,
        "dtype": job.dtype,
        "4bit": job.four_bit,
        "prompt_template": job.prompt_template,
        "max_new_tokens": job.max_new_tokens,
        "adapters": list(job.adapters),
    }


def _write(
    folder: Path, benchmark: Benchmark, answers: Mapping[int, str], result: MMBenchResult, job: MMBenchJob
) -> None:
    import pandas

    # A worksheet takes no control characters, on which xtuner ends with an error; the lines of `Answers` have them.
    rows = [row(question, _CONTROLS.sub("", answers[question.index])) for question in benchmark.questions]
    table = pandas.DataFrame(rows)
    try:
        with pandas.ExcelWriter(folder / XLSX, engine="openpyxl") as writer:
            table.to_excel(writer, index=False)
        (folder / ARGS).write_bytes(to_json(_arguments(job)))
        if result.scores is not None:
            (folder / SCORES).write_text(json.dumps(result.scores, indent=2, ensure_ascii=False), encoding="utf-8")
    except ImportError:
        raise UsageError(
            "eval needs openpyxl, which is not installed", hint="pip install 'llava-convert[eval]'"
        ) from None
    except OSError as problem:
        raise OutputError(
            f"{folder}: {problem.strerror or problem}", hint="--work-dir DIR is where the results go"
        ) from problem


def _arguments(job: MMBenchJob) -> dict[str, Any]:
    from llava_convert.core.flags import options_of

    said = {name: getattr(job, name) for name in options_of(type(job))}
    return {
        name: value if isinstance(value, bool | int | float) or value is None else str(value)
        for name, value in said.items()
    }
