"""Questions to a model, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.jobs import SOURCE
from llava_convert.app.options import AskOptions, PathLike
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import CHECKS, RUN, Flag, Flagged, as_names
from llava_convert.core.progress import OnBytes, Reporter
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from llava_convert.app.ask.chat import Reply
    from llava_convert.app.benchmarks.run import EvalResult
    from llava_convert.app.mmbench.compare import Compared
    from llava_convert.app.mmbench.run import MMBenchResult


@dataclass(frozen=True)
class ChatJob(AskOptions):
    """A conversation with a model."""

    source: Annotated[PathLike, SOURCE]
    prompt: Annotated[str | None, Flag("The question. Without it, a conversation begins.", argument=True)] = None
    _: KW_ONLY
    image: Annotated[
        PathLike | Sequence[PathLike] | None,
        Flag("A picture to ask about. Repeatable.", RUN, metavar="FILE|URL", repeated=True),
    ] = None
    system: Annotated[
        str | None,
        Flag("System message, if the model's template takes one.", RUN, metavar="TEXT"),
    ] = None

    @property
    def images(self) -> tuple[str, ...]:
        return as_names(self.image)

    def run(self, say: Reporter) -> Reply:
        from llava_convert.app.ask.chat import one_answer

        if self.prompt is None:
            raise UsageError("PROMPT is missing", hint="give the question after the source")
        return one_answer(self, self.prompt, say)


@dataclass(frozen=True)
class MMBenchJob(AskOptions):
    """The questions of MMBench or CCBench put to a model."""

    source: Annotated[PathLike, SOURCE]
    _: KW_ONLY
    data: Annotated[
        PathLike,
        Flag("Benchmark file: MMBench_DEV_EN.tsv, its TEST and CN versions, or CCBench.tsv.", RUN, metavar="FILE.tsv"),
    ]
    work_dir: Annotated[
        PathLike | None,
        Flag(
            "Folder for answers and scores. A killed run continues there. Default: work_dirs/<FILE>.",
            RUN,
            metavar="DIR",
        ),
    ] = None
    force: Annotated[bool, Flag("Start over, whatever the folder holds.", CHECKS)] = False
    report: Annotated[
        PathLike | None, Flag("Write a page with the scores, pictures and answers.", RUN, metavar="FILE.html")
    ] = None
    max_new_tokens: Annotated[int, Flag("Maximum length of an answer, in tokens.", RUN, metavar="N")] = 100
    progress: Reporter | OnBytes | bool | None = None

    def run(self, say: Reporter) -> MMBenchResult:
        from llava_convert.app.mmbench.run import run_mmbench

        return run_mmbench(self, say)


@dataclass(frozen=True)
class CompareJob(Flagged):
    """Two runs of MMBench on one file, answer by answer."""

    source: Annotated[PathLike, Flag("The --work-dir of one run.", metavar="A", argument=True)]
    out: Annotated[PathLike, Flag("The --work-dir of another run.", metavar="B", argument=True)]
    _: KW_ONLY
    data: Annotated[PathLike, Flag("The benchmark file that both runs answered.", RUN, metavar="FILE.tsv")]
    report: Annotated[
        PathLike, Flag("HTML page to write, with the answers that changed.", RUN, metavar="FILE.html")
    ] = "compared.html"

    def run(self, say: Reporter) -> Compared:
        from llava_convert.app.mmbench.compare import run_compare

        return run_compare(self)


@dataclass(frozen=True)
class EvalJob(AskOptions):
    """Benchmarks of lmms-eval, answered by a model."""

    tasks: Annotated[
        str | Sequence[str], Flag("Tasks of lmms-eval: mme,pope,gqa,…", metavar="TASK[,TASK…]", argument=True)
    ]
    source: Annotated[PathLike, SOURCE]
    _: KW_ONLY
    work_dir: Annotated[
        PathLike | None,
        Flag("Folder for results.csv and results.json. Default: work_dirs/<SOURCE>-eval.", RUN, metavar="DIR"),
    ] = None
    include: Annotated[PathLike | None, Flag("Folder with your own tasks (YAML).", RUN, metavar="DIR")] = None
    limit: Annotated[int | None, Flag("Only the first N questions of each task.", RUN, metavar="N")] = None
    card: Annotated[bool, Flag("Add the table to the README.md of SOURCE.", RUN)] = False
    report: Annotated[
        PathLike | None, Flag("Write a page with the scores, pictures and answers.", RUN, metavar="FILE.html")
    ] = None
    progress: Reporter | OnBytes | bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        words = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return tuple(word.strip() for word in words if word.strip())

    def run(self, say: Reporter) -> EvalResult:
        from llava_convert.app.benchmarks.run import run_tasks

        return run_tasks(self, say)
