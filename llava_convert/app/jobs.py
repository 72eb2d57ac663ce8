"""The jobs: for each command a class that holds all that it can be told, and runs it.

`cli` makes a command of each, `api` a function. A field without a Flag is for Python alone. Nothing heavy is imported
before a job runs, since `--help` reads these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.options import BranchOptions, HubOptions, NamedBases, Options, PathLike, SourceOptions
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import CHECKS, OUTPUT, PUBLISH, Flag, as_names
from llava_convert.core.progress import OnBytes, Reporter
from llava_convert.layouts.info import MERGED, TARGETS
from llava_convert.model.options import FULL, OFF, PartOption, TypesOption

if TYPE_CHECKING:
    from llava_convert.app.inspect import Inspection
    from llava_convert.app.publish.release import ReleaseItem
    from llava_convert.app.verify import Verdict
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
    dry_run: Annotated[bool, Flag("Print the plan; write nothing.", CHECKS)] = False
    progress: Reporter | OnBytes | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push is not None and self.out is not None:
            from llava_convert.storage.remote.reach import url_of

            if (url := url_of(Path(self.out))) is not None:
                raise UsageError(
                    f"--push with -o {url}: a folder of this machine is published", hint="leave -o out, or name one"
                )

    def run(self, say: Reporter) -> Report:
        from llava_convert.app.convert import convert, plan
        from llava_convert.app.publish.upload import pushed

        if self.dry_run:
            return plan(self.source, self)
        if self.push is None:
            return convert(self.source, self, say)
        to = self.destination(self.push)
        return pushed(lambda: convert(self.source, self, say), to, say, level=self.level)


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
class InspectJob(SourceOptions):
    """A look at a checkpoint."""

    source: Annotated[PathLike, _SOURCE]

    def run(self, say: Reporter) -> Inspection:
        from llava_convert.app.inspect import inspect

        return inspect(self.source, self)


@dataclass(frozen=True)
class VerifyJob(SourceOptions, PartOption):
    """A comparison of two checkpoints."""

    source: Annotated[PathLike, _SOURCE]
    out: Annotated[PathLike, Flag("A checkpoint of any layout, from any converter.", argument=True)]
    _: KW_ONLY
    strict: Annotated[bool, Flag("Unrecorded vocabulary rows are a difference.", CHECKS)] = False
    check: bool = False
    progress: Reporter | OnBytes | None = None

    def run(self, say: Reporter) -> Verdict:
        from llava_convert.app.convert import verify

        verdict = verify(self.source, self.out, self, say, part=self.part)
        if self.check:
            verdict.refuse(strict=self.strict)
        return verdict


@dataclass(frozen=True)
class UploadJob(SourceOptions, BranchOptions):
    """A folder that is published."""

    folder: Annotated[PathLike, Flag("What a conversion wrote, or another checkpoint.", metavar="DIR", argument=True)]
    repo: Annotated[str, Flag("OWNER/NAME; made if it does not exist.", argument=True)]
    _: KW_ONLY
    message: Annotated[str | None, Flag("Message of the commit.", PUBLISH, metavar="TEXT")] = None
    verify: Annotated[
        str, Flag("full: the recorded sha256 of every file, or --source.", CHECKS, choices=(FULL, OFF))
    ] = FULL
    source: Annotated[
        PathLike | None, Flag("Compare DIR with what it was converted from, now.", CHECKS, metavar="SOURCE")
    ] = None
    include: Annotated[
        str | Sequence[str],
        Flag(
            "Publish this file of DIR though it looks like a secret; may be given again.",
            PUBLISH,
            metavar="FILE",
            repeated=True,
        ),
    ] = ()
    progress: Reporter | OnBytes | None = None

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
            "These layouts. Default: all; pretrain where there is a stage-1 checkpoint.",
            OUTPUT,
            metavar="xtuner,official,hf,gguf,pretrain",
        ),
    ] = None
    out: Annotated[
        PathLike | None, Flag("Holds one folder a layout. Default: ./NAME.", OUTPUT, metavar="DIR", short="-o")
    ] = None
    dry_run: Annotated[bool, Flag("Print the table; write nothing, send nothing.", CHECKS)] = False
    progress: Reporter | OnBytes | None = None

    @property
    def layouts(self) -> tuple[str, ...]:
        """The words of `--only`; none for all."""
        words = self.only.split(",") if isinstance(self.only, str) else self.only or ()
        return tuple(word.strip().lower() for word in words)

    def run(self, say: Reporter) -> tuple[ReleaseItem, ...]:
        from llava_convert.app.publish.release import plan, run_release

        return tuple(plan(self) if self.dry_run else run_release(self, say))
