"""A conversion, a plan of one, a merge, and every checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.jobs import SOURCE
from llava_convert.app.options import Options, PathLike
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import CHECKS, RUN, Flag
from llava_convert.core.progress import OnBytes, Reporter
from llava_convert.core.values import dataclass
from llava_convert.layouts.info import MERGED, TARGETS

if TYPE_CHECKING:
    from llava_convert.app.sweep import SweepItem
    from llava_convert.engine.report import Report


@dataclass(frozen=True)
class PlanJob(Options):
    """What a conversion would do."""

    source: Annotated[PathLike, SOURCE]

    def run(self, say: Reporter) -> Report:
        from llava_convert.app.convert import plan

        return plan(self.source, self)


@dataclass(frozen=True)
class ConvertJob(Options):
    """A conversion, published afterwards where it is to be."""

    source: Annotated[PathLike, SOURCE]
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
