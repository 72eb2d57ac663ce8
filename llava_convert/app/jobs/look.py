"""A look at a checkpoint, a comparison of two, and the problems of a folder."""

from __future__ import annotations

from dataclasses import KW_ONLY, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llava_convert.app.jobs import SOURCE
from llava_convert.app.options import PathLike, SourceOptions
from llava_convert.core.errors import UsageError
from llava_convert.core.flags import AUTO, CHECKS, RUN, Flag, Flagged
from llava_convert.core.progress import OnBytes, Reporter, stage
from llava_convert.core.values import dataclass
from llava_convert.model.options import ALL, PartOption

if TYPE_CHECKING:
    from llava_convert.app.doctor.run import Diagnosis
    from llava_convert.app.inspect import Inspection
    from llava_convert.app.verdict import Verdict


@dataclass(frozen=True)
class InspectJob(SourceOptions):
    """A look at a checkpoint."""

    source: Annotated[PathLike, SOURCE]
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

    source: Annotated[PathLike, SOURCE]
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
