"""The Python API: the command line's verbs, with its options as keywords."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

from llava_convert.app.ask.chat import Reply
from llava_convert.app.doctor.run import Diagnosis
from llava_convert.app.inspect import Inspection
from llava_convert.app.jobs import ask as ask_jobs
from llava_convert.app.jobs import convert as convert_jobs
from llava_convert.app.jobs import look as look_jobs
from llava_convert.app.jobs import publish as publish_jobs
from llava_convert.app.mmbench.run import MMBenchResult
from llava_convert.app.publish.release import ReleaseItem
from llava_convert.app.sweep import SweepItem
from llava_convert.app.verdict import Verdict
from llava_convert.core.errors import ConvertError, system_errors
from llava_convert.core.flags import Flagged, in_keywords, options_of
from llava_convert.core.progress import OnBytes, Reporter, reporter
from llava_convert.engine.report import Published, Report

P = ParamSpec("P")
J = TypeVar("J")
R = TypeVar("R")

_JOBS = [
    one
    for module in (convert_jobs, look_jobs, ask_jobs, publish_jobs)
    for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, Flagged) and one.__module__ == module.__name__
]
# Messages name options by their flags, since most are read in a terminal. Here they become keywords, all in one place.
_in_keywords = in_keywords(option for job in _JOBS for option in options_of(job).values())
# What of a result is text for people.
_TOLD = frozenset({"use", "notes", "warnings", "settings", "defects", "targets", "parts", "detail"})


class _InKeywords:
    """A reporter whose notes and warnings speak of keywords."""

    def __init__(self, to: Reporter) -> None:
        self._to = to
        self.start = to.start
        self.note: Callable[[str], None] = lambda text: to.note(_in_keywords(text))
        self.warn: Callable[[str], None] = lambda text: to.warn(_in_keywords(text))

    def __getattr__(self, name: str) -> Any:
        """What a reporter can show beyond the three: stages without a total, files."""
        return getattr(self._to, name)


@contextmanager
def _telling(progress: Reporter | OnBytes | bool | None) -> Iterator[Reporter]:
    """What a job reports to, of what a caller gives; a line of progress is taken away at the end."""
    if progress is not True:
        yield _InKeywords(reporter(progress or None))
        return
    from llava_convert.app.progress_line import Shown

    shown = Shown()
    try:
        yield _InKeywords(shown)
        shown.finish()
    finally:
        shown.stop()


def _keywords(job: Callable[P, J]) -> Callable[[Callable[[J], R]], Callable[P, R]]:
    """Give a function of a job that job's fields as its parameters, for type checkers, `help()` and TAB."""

    def decorate(run: Callable[[J], R]) -> Callable[P, R]:
        signature, about = _face(job)

        @wraps(run)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as problem:
                raise TypeError(f"{run.__name__}() {problem}") from None
            try:
                with system_errors():
                    return _told(run(job(*args, **kwargs)))
            except ConvertError as problem:
                problem.reword(_in_keywords)
                raise

        result = get_type_hints(run)["return"]
        called.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {"return": result}
        called.__doc__ = f"{run.__doc__}\n\n    {about}\n    "
        del called.__dict__["__wrapped__"]  # whose signature is not that of the callers
        return called

    return decorate


def _face(job: Any) -> tuple[signatures.Signature, str]:
    """The signature of a job's callers, in the order of its `--help`; and a line for each of its parameters."""
    bare, options = get_type_hints(job), options_of(job)
    parameters = list(signatures.signature(job).parameters.values())
    parameters = [p.replace(annotation=bare[p.name]) for p in parameters]
    texts = {name: option.flag.help for name, option in options.items()}
    lines = [f"{p.name}: {_in_keywords(texts[p.name])}" for p in parameters if p.name in texts]
    return signatures.Signature(parameters), "\n    ".join(lines)


def _told(result: R) -> R:
    """A result whose texts speak of keywords."""
    if not is_dataclass(result) or isinstance(result, type):
        return result
    texts = {one.name: _reworded(getattr(result, one.name)) for one in fields(result) if one.name in _TOLD}
    return replace(result, **texts)


def _reworded(value: Any) -> Any:
    if isinstance(value, str):
        return _in_keywords(value)
    if isinstance(value, tuple):
        return tuple(map(_reworded, value))
    if isinstance(value, dict):
        return {key: _reworded(item) for key, item in value.items()}
    return _told(value)


@_keywords(convert_jobs.ConvertJob)
def convert(job: convert_jobs.ConvertJob) -> Report:
    """Convert a checkpoint to another layout; with `push`, upload it afterwards.

    `progress` is True for a line that shows stage, percent, rate and time left, a Reporter, or a function that is
    called with the bytes done and the total of each stage. Raises
    `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(convert_jobs.MergeJob)
def merge(job: convert_jobs.MergeJob) -> Report:
    """Merge adapters into a model of any layout. The same as `convert` with `adapter`.

    `progress` as for `convert`. Raises `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(convert_jobs.PlanJob)
def plan(job: convert_jobs.PlanJob) -> Report:
    """Return the report of `convert` with the same keywords, without doing it. Reads only headers.

    `files` are the files that would be written, with their sizes; `bytes_written` is their sum. Raises what `convert`
    raises before it writes.
    """
    return job.run(_InKeywords(reporter(None)))


@_keywords(look_jobs.InspectJob)
def inspect(job: look_jobs.InspectJob) -> Inspection:
    """Say what a checkpoint is, what is missing and what it can become. Reads only headers; raises `ConvertError`."""
    return job.run(_InKeywords(reporter(None)))


@_keywords(look_jobs.VerifyJob)
def verify(job: look_jobs.VerifyJob) -> Verdict:
    """Compare OUT with SOURCE, tensor by tensor. Any converter may have made OUT.

    The verdict is true if they are the same. With `check`, a difference raises `MismatchError`.
    `progress` as for `convert`.
    Raises `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(ask_jobs.ChatJob)
def chat(job: ask_jobs.ChatJob) -> Reply:
    """Ask a model of any layout one question, with or without pictures. The answer is greedy.

    Raises `ConvertError`.
    """
    return job.run(_InKeywords(reporter(None)))


@_keywords(look_jobs.DoctorJob)
def doctor(job: look_jobs.DoctorJob) -> Diagnosis:
    """Find what would make a program fail on a folder; with `fix` the small files are repaired in place.

    The result is true if no problem is left. Raises `ConvertError`.
    """
    return job.run(_InKeywords(reporter(None)))


@_keywords(ask_jobs.MMBenchJob)
def mmbench(job: ask_jobs.MMBenchJob) -> MMBenchResult:
    """Score a model of any layout on a TSV file of MMBench or CCBench, by xtuner's prompt and rule.

    Answers, scores and the file to submit are written to `work_dir`.
    `progress` as for `convert`. Raises `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(publish_jobs.UploadJob)
def upload(job: publish_jobs.UploadJob) -> tuple[Published, ...]:
    """Upload a folder after checking it against its source. Returns one item per hub.

    `progress` as for `convert`. Raises `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(publish_jobs.ReleaseJob)
def release(job: publish_jobs.ReleaseJob) -> tuple[ReleaseItem, ...]:
    """Convert a model to every layout and upload each to its own repository. Returns one item per layout.

    Layouts that an earlier run finished are kept. `progress` as for `convert`. Raises `ConvertError`.
    """
    with _telling(job.progress) as say:
        return job.run(say)


@_keywords(convert_jobs.SweepJob)
def sweep(job: convert_jobs.SweepJob) -> tuple[SweepItem, ...]:
    """Convert every checkpoint that matches a pattern, once. Returns one item per checkpoint.

    If one cannot be converted, its item says why, and the others go on. `progress` as for `convert`.
    Raises `ConvertError` if nothing matches, or nothing can be written.
    """
    with _telling(job.progress) as say:
        return job.run(say)
