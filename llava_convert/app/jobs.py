"""The jobs: for each command a class that holds all that it can be told, and runs it.

`cli` makes a command of each, `api` a function. A field without a Flag is for Python alone. Nothing heavy is imported
before a job runs, since `--help` reads these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.options import (
    AskOptions,
    BranchOptions,
    HubOptions,
    NamedBases,
    Options,
    PathLike,
    SourceOptions,
)
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import AUTO, CHECKS, OUTPUT, PUBLISH, RUN, Flag, Flagged, as_names
from llava_convert.core.progress import OnBytes, Reporter, stage
from llava_convert.layouts.info import MERGED, TARGETS
from llava_convert.model.options import ALL, FULL, OFF, PartOption, TypesOption

if TYPE_CHECKING:
    from llava_convert.app.ask.chat import Reply
    from llava_convert.app.benchmarks.run import EvalResult
    from llava_convert.app.doctor.run import Diagnosis
    from llava_convert.app.inspect import Inspection
    from llava_convert.app.mmbench.compare import Compared
    from llava_convert.app.mmbench.run import MMBenchResult
    from llava_convert.app.publish.release import ReleaseItem
    from llava_convert.app.sweep import SweepItem
    from llava_convert.app.verdict import Verdict
    from llava_convert.engine.report import Published, Report

_SOURCE = Flag(
    "A file, a folder, a training work_dir; a hub's model (ORG/NAME, hf://…, ms://…), or a URL (s3://…).",
    argument=True,
)


@dataclass(frozen=True)
class PlanJob(Options):
    """What a conversion would do."""

    source: Annotated[PathLike, _SOURCE]

    def run(self, say: Reporter) -> Report:
        from llava_convert.app.convert import plan

        return plan(self.source, self)


@dataclass(frozen=True)
class ConvertJob(Options):
    """A conversion, published afterwards where it is to be."""

    source: Annotated[PathLike, _SOURCE]
    _: KW_ONLY
    dry_run: Annotated[bool, Flag("Print the plan, files, disk, memory and time. Write nothing.", CHECKS)] = False
    progress: Reporter | OnBytes | bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push is not None and self.out is not None:
            from llava_convert.storage.remote.reach import url_of

            if (url := url_of(Path(self.out))) is not None:
                raise UsageError(
                    f"--push with -o {url}: a folder of this machine is published", hint="leave -o out, or name one"
                )

    def run(self, say: Reporter) -> Report:
        from llava_convert.app.cluster import convert_anywhere
        from llava_convert.app.convert import plan

        if self.dry_run:
            return plan(self.source, self)
        if self.push is None:
            return convert_anywhere(self.source, self, say)
        from llava_convert.app.publish.upload import pushed

        to = self.destination(self.push)
        return pushed(lambda: convert_anywhere(self.source, self, say), to, say, level=self.level)


@dataclass(frozen=True)
class MergeJob(ConvertJob):
    """A model with adapters merged into it."""

    source: Annotated[
        PathLike,
        Flag("The model that the adapters were trained on, of any layout.", argument=True, metavar="BASE"),
    ]
    _: KW_ONLY
    adapter: Annotated[
        PathLike | Sequence[PathLike],
        Flag("Adapters, merged in this order.", argument=True, metavar="ADAPTER", repeated=True),
    ] = field()
    to: Annotated[str, Flag("Layout to convert to.", choices=tuple(TARGETS))] = MERGED


@dataclass(frozen=True)
class SweepJob(Options):
    """Every checkpoint of a run, each converted once."""

    source: Annotated[
        str,
        Flag(
            "Pattern of the checkpoints, in quotes: 'run/iter_*.pth', 's3://runs/*/iter_*.pth'.",
            argument=True,
            metavar="PATTERN",
        ),
    ]
    _: KW_ONLY
    watch: Annotated[
        int | None, Flag("Look for new checkpoints every N seconds, until Ctrl-C.", RUN, metavar="SECONDS")
    ] = None
    dry_run: Annotated[bool, Flag("Print what would be done. Write nothing.", CHECKS)] = False
    progress: Reporter | OnBytes | bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch is not None and self.watch < 1:
            raise UsageError(f"--watch {self.watch}: give a number of seconds, 1 or more")
        for flag, given in (("--files", self.files), ("--finish", self.finish), ("--resume", self.resume)):
            if given:
                raise UsageError(f"{flag} does not apply to a sweep", hint="leave it out: a sweep goes on by itself")

    def run(self, say: Reporter) -> tuple[SweepItem, ...]:
        from llava_convert.app.sweep import sweep

        return tuple(sweep(self, say))


@dataclass(frozen=True)
class InspectJob(SourceOptions):
    """A look at a checkpoint."""

    source: Annotated[PathLike, _SOURCE]
    _: KW_ONLY
    html: Annotated[PathLike | None, Flag("Write the result as one HTML page.", RUN, metavar="FILE.html")] = None

    def run(self, say: Reporter) -> Inspection:
        from llava_convert.app.inspect import inspect

        stage(say, "reading headers")
        found = inspect(self.source, self)
        if self.html is not None:
            from llava_convert.app.pages.html import write
            from llava_convert.app.pages.inspect_page import inspect_page

            write(Path(self.html), inspect_page(found, str(self.source), self), flag="--html")
        return found


@dataclass(frozen=True)
class VerifyJob(SourceOptions, PartOption):
    """A comparison of two checkpoints."""

    source: Annotated[PathLike, _SOURCE]
    out: Annotated[PathLike, Flag("A checkpoint of any layout, from any converter.", argument=True)]
    _: KW_ONLY
    strict: Annotated[bool, Flag("Count unrecorded vocabulary rows as a difference.", CHECKS)] = False
    logits: Annotated[
        bool,
        Flag(
            "Also run both models on the same pictures and prompts, and compare features, logits and answers.", CHECKS
        ),
    ] = False
    layers: Annotated[bool, Flag("Show the difference after each layer, with --logits.", CHECKS)] = False
    device: Annotated[
        str | None,
        Flag("Device to compute on, with --logits. Default: a GPU.", CHECKS, choices=(AUTO, "cpu", "cuda")),
    ] = None
    runtime: Annotated[
        str | None,
        Flag(
            "Program that runs OUT, with --logits. Default: this package, which compares the most.",
            CHECKS,
            choices=(AUTO, "transformers", "official", "llama.cpp", "mlx"),
        ),
    ] = None
    report: Annotated[PathLike | None, Flag("Write the result as one HTML page.", CHECKS, metavar="FILE.html")] = None
    check: bool = False
    progress: Reporter | OnBytes | bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given in (("--layers", self.layers), ("--device", self.device), ("--runtime", self.runtime)):
            if given and not self.logits:
                raise UsageError(f"{flag} does not apply", hint="it is for --logits")
        if self.logits and self.part != ALL:
            raise UsageError("--logits does not apply to a part", hint="leave --part out: a model answers as a whole")

    def run(self, say: Reporter) -> Verdict:
        from llava_convert.app.verify import verify

        verdict = verify(self.source, self.out, self, say, part=self.part, provenance=self.report is not None)
        if self.logits:
            from llava_convert.app.logits.run import compare_answers

            verdict = replace(
                verdict,
                logits=compare_answers(self.source, self.out, self, say, device=self.device, runtime=self.runtime),
            )
        if self.report is not None:
            from llava_convert.app.pages.html import write
            from llava_convert.app.pages.verify_page import verify_page
            from llava_convert.app.provenance import Made, command_of

            write(Path(self.report), verify_page(verdict, Made.now(command_of("verify", self))))
        if self.check:
            verdict.refuse(strict=self.strict)
        return verdict


@dataclass(frozen=True)
class ChatJob(AskOptions):
    """A conversation with a model."""

    source: Annotated[PathLike, _SOURCE]
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

    source: Annotated[PathLike, _SOURCE]
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
    source: Annotated[PathLike, _SOURCE]
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


@dataclass(frozen=True)
class DoctorJob(Flagged):
    """Find the problems that a program would have with a folder."""

    folder: Annotated[PathLike, Flag("The folder to load.", metavar="DIR", argument=True)]
    _: KW_ONLY
    consumer: Annotated[
        str,
        Flag(
            "The program: transformers, vllm, llama.cpp or ollama; with a version: transformers@4.46.",
            CHECKS,
            metavar="PROGRAM[@VERSION]",
            spelling="--for",
            offers=("transformers", "vllm", "llama.cpp", "ollama"),
        ),
    ]
    fix: Annotated[bool, Flag("Fix the small files. The old folder stays beside the new one.", CHECKS)] = False

    def run(self, say: Reporter) -> Diagnosis:
        from llava_convert.app.doctor.run import diagnose

        stage(say, "looking")
        return diagnose(self, say)


@dataclass(frozen=True)
class UploadJob(SourceOptions, BranchOptions):
    """A folder that is published."""

    folder: Annotated[PathLike, Flag("A converted folder, or another checkpoint.", metavar="DIR", argument=True)]
    repo: Annotated[str, Flag("OWNER/NAME. It is created if it does not exist.", argument=True)]
    _: KW_ONLY
    message: Annotated[str | None, Flag("Commit message.", PUBLISH, metavar="TEXT")] = None
    verify: Annotated[
        str, Flag("full: compare every file with its recorded sha256, or with --source.", CHECKS, choices=(FULL, OFF))
    ] = FULL
    source: Annotated[
        PathLike | None, Flag("The model that DIR was converted from: compare with it first.", CHECKS, metavar="SOURCE")
    ] = None
    include: Annotated[
        str | Sequence[str],
        Flag(
            "Upload this file even if it looks like a secret. Repeatable.",
            PUBLISH,
            metavar="FILE",
            repeated=True,
        ),
    ] = ()
    progress: Reporter | OnBytes | bool | None = None

    def run(self, say: Reporter) -> tuple[Published, ...]:
        from llava_convert.app.publish.upload import upload

        to = self.destination(self.repo, self.message)
        return upload(
            Path(self.folder),
            to,
            say,
            level=self.verify,
            source=self.source,
            options=self,
            include=as_names(self.include),
        )


@dataclass(frozen=True)
class ReleaseJob(NamedBases, HubOptions, TypesOption):
    """Every layout of a model, each in a repository of its own."""

    source: Annotated[PathLike, _SOURCE]
    name: Annotated[
        str,
        Flag(
            "Repositories: NAME (xtuner), NAME-hf (official), NAME-transformers (hf), NAME-gguf, NAME-pretrain.",
            metavar="ORG/NAME",
        ),
    ]
    _: KW_ONLY
    only: Annotated[
        str | Sequence[str] | None,
        Flag(
            "Only these layouts. Default: all; pretrain if there is a stage-1 checkpoint.",
            OUTPUT,
            metavar="xtuner,official,hf,gguf,pretrain",
        ),
    ] = None
    out: Annotated[
        PathLike | None,
        Flag("Folder that gets one folder per layout. Default: ./NAME.", OUTPUT, metavar="DIR", short="-o"),
    ] = None
    dry_run: Annotated[bool, Flag("Print the table. Write nothing, send nothing.", CHECKS)] = False
    progress: Reporter | OnBytes | bool | None = None

    @property
    def layouts(self) -> tuple[str, ...]:
        """The words of `--only`; none for all."""
        words = self.only.split(",") if isinstance(self.only, str) else self.only or ()
        return tuple(word.strip().lower() for word in words)

    def run(self, say: Reporter) -> tuple[ReleaseItem, ...]:
        from llava_convert.app.publish.release import plan, run_release

        return tuple(plan(self) if self.dry_run else run_release(self, say))
