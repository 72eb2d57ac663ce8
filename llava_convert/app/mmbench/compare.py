"""`eval compare A B`: the answers of two runs on one file, side by side with their pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.mmbench.answers import stored
from llava_convert.app.mmbench.data import read_benchmark
from llava_convert.app.mmbench.run import PROVENANCE
from llava_convert.app.mmbench.score import AVERAGE, scores
from llava_convert.app.pages.html import write
from llava_convert.app.pages.mmbench_page import compare_page
from llava_convert.app.pages.provenance_part import provenance_part
from llava_convert.app.provenance import COMPUTING, Made, command_of
from llava_convert.core.errors import InputError
from llava_convert.core.values import dataclass
from llava_convert.storage.json_files import read_object

if TYPE_CHECKING:
    from llava_convert.app.jobs.ask import CompareJob


@dataclass(frozen=True)
class Compared:
    """How many of the answers differ, where the page is, and each run's average; None without right answers."""

    source: str
    out: str
    report: str
    questions: int
    changed: int
    averages: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "averages": None if self.averages is None else list(self.averages)}


def run_compare(job: CompareJob) -> Compared:
    """Raises InputError where a folder holds no answers, or those of another file, or not all of them."""
    benchmark = read_benchmark(Path(job.data))
    with benchmark.path.open("rb") as stream:
        data = hashlib.file_digest(stream, "sha256").hexdigest()
    sides = {}
    for folder in (Path(job.source), Path(job.out)):
        about, answers = stored(folder)
        if about.get("data") != data:
            raise InputError(f"{folder} holds answers to another file than {benchmark.path}", hint="give it by --data")
        if lacking := [q.index for q in benchmark.questions if q.index not in answers]:
            raise InputError(
                f"{folder}: {len(lacking)} questions are not answered",
                hint="run `llava-convert eval mmbench` there again",
            )
        sides[str(folder)] = answers
    if len(sides) < 2:
        raise InputError(f"{job.source} and {job.out} are one folder", hint="give the folders of two runs")
    made = Made.now(command_of("eval compare", job))
    part = provenance_part({name: _told(Path(name)) for name in sides}, made)
    page, changed = compare_page(benchmark, sides, part)
    write(Path(job.report), page)
    every = [scores(benchmark, answers)[AVERAGE] for answers in sides.values()] if benchmark.has_answers else None
    return Compared(
        str(job.source), str(job.out), str(job.report), len(benchmark.questions), changed,
        None if every is None else (every[0], every[1]),
    )  # fmt: skip


def _told(folder: Path) -> dict[str, str]:
    """Where the answers in a folder come from, as the run that ended there says. Raises InputError."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {"answers": f"no {PROVENANCE} beside them"}
    found = read_object(path)
    model, used = found.get("model"), found.get("versions")
    rows = {str(name): str(value) for name, value in model.items()} if isinstance(model, dict) else {}
    computed = [f"{name} {used[name]}" for name in COMPUTING if name in used] if isinstance(used, dict) else []
    return {
        **rows,
        "answered by": str(found.get("command")),
        "answered on": str(found.get("date")),
        "computed by": ", ".join(computed),
    }
