"""A folder, or every layout of a model, on a hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.jobs import SOURCE
from llava_convert.app.options import BranchOptions, HubOptions, NamedBases, PathLike, SourceOptions
from llava_convert.core.flags import CHECKS, OUTPUT, PUBLISH, Flag, as_names
from llava_convert.core.progress import OnBytes, Reporter
from llava_convert.core.values import dataclass
from llava_convert.model.options import FULL, OFF, TypesOption

if TYPE_CHECKING:
    from llava_convert.app.publish.release import ReleaseItem
    from llava_convert.engine.report import Published


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

    source: Annotated[PathLike, SOURCE]
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
