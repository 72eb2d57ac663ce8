"""The Python API: the command line's verbs with its options as keywords."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from llava_convert.app import convert as engine
from llava_convert.app.inspect import Inspection
from llava_convert.app.inspect import inspect as look
from llava_convert.app.options import Options, SourceOptions, dtype_named
from llava_convert.app.publish.publish import named_hubs
from llava_convert.app.publish.release import Item as ReleaseItem
from llava_convert.app.publish.release import Release, run_release
from llava_convert.app.publish.release import plan as plan_release
from llava_convert.app.publish.upload import push_level, pushed
from llava_convert.app.publish.upload import upload as publish_folder
from llava_convert.app.verify import Verdict
from llava_convert.core.errors import ConvertError, UsageError
from llava_convert.core.progress import OnBytes, Reporter, reporter
from llava_convert.engine.check import FULL, QUICK
from llava_convert.engine.report import Published, Report
from llava_convert.layouts.info import layout_named
from llava_convert.model.options import ALL, TargetOptions
from llava_convert.model.recipe import Bases
from llava_convert.storage.hubs import HUGGINGFACE, MESSAGE, Destination
from llava_convert.storage.remote.reach import url_of

__all__ = [
    "Inspection",
    "Published",
    "ReleaseItem",
    "Report",
    "Reporter",
    "Verdict",
    "convert",
    "inspect",
    "of_python",
    "plan",
    "release",
    "type_names",
    "upload",
    "verify",
]
PathLike = str | Path
_P = ParamSpec("_P")
_R = TypeVar("_R")


def convert(
    source: PathLike,
    *,
    to: str,
    out: PathLike | None = None,
    name: str | None = None,
    llm: str | None = None,
    visual_encoder: str | None = None,
    llm_id: str | None = None,
    visual_encoder_id: str | None = None,
    pretrained_pth: PathLike | None = None,
    config: PathLike | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    adapter: PathLike | Sequence[PathLike] | None = None,
    allow_key: str | Sequence[str] | None = None,
    cache: bool = False,
    dequantize: bool = False,
    dtype: object = None,
    max_shard_size: str | int | None = None,
    part: str = ALL,
    prompt_template: str | None = None,
    image_processor: str | None = None,
    outtype: str | Sequence[str] | None = None,
    mmproj_outtype: str | Sequence[str] | None = None,
    pre: str | None = None,
    as_family: str | None = None,
    verify: str | None = None,
    digest: bool = False,
    dry_run: bool = False,
    source_layout: str | None = None,
    force: bool = False,
    resume: bool = False,
    threads: int = 0,
    push: str | None = None,
    hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    progress: Reporter | OnBytes | None = None,
) -> Report:
    """Convert a checkpoint to another layout; with `dry_run` only plan it, with `push` publish it afterwards.

    The options are those of the command line, where `llava-convert convert --help` explains them. Raises
    `llava_convert.ConvertError`. A source may be a hub's model or a URL, as on the command line.
    """
    to_hub = Destination(push or "", named_hubs(hub or HUGGINGFACE), private, revision, create_pr)
    if push is None and (hub is not None or private or revision is not None or create_pr):
        raise UsageError(
            "--hub, --private, --revision and --create-pr say how to publish", hint="--push REPO publishes"
        )
    target = layout_named(to)
    level = (verify or QUICK) if push is None else push_level(verify)
    if push is not None and out is not None and url_of(Path(out)) is not None:
        raise UsageError(
            f"--push with -o {url_of(Path(out))}: a folder of this machine is published",
            hint="leave -o out, or name one",
        )
    options = Options(
        to=target.name,
        asked=None if to.strip().lower() == target.name else to,
        out=_path(out),
        name=name,
        source_layout=source_layout,
        config=_path(config),
        pretrained_pth=_path(pretrained_pth),
        dequantize=dequantize,
        adapter=_names(adapter),
        allow_key=_names(allow_key),
        bases=Bases(llm, visual_encoder, llm_id, visual_encoder_id, _alpha(lora_alpha), cache),
        target=TargetOptions(
            dtype=None if dtype is None else dtype_named(str(dtype)),
            max_shard_size=None if max_shard_size is None else str(max_shard_size),
            part=part,
            prompt_template=prompt_template,
            image_processor=image_processor,
            outtypes=type_names(outtype),
            mmproj_outtypes=type_names(mmproj_outtype),
            pre=pre,
            as_family=as_family,
        ),
        verify=level,
        digest=digest,
        force=force,
        resume=resume,
        threads=threads,
        repo=to_hub.address if push is not None else None,
    )
    say = reporter(progress)
    if dry_run:
        return engine.plan(source, options)
    if push is not None:
        return pushed(lambda: engine.convert(source, options, say), to_hub, say, level=level)
    return engine.convert(source, options, say)


def plan(source: PathLike, *, to: str, **options: Any) -> Report:
    """What a conversion would write: every file and its size, notes and warnings. Nothing is written.

    The options are those of `convert`. Raises what `convert` raises before it writes.
    """
    return convert(source, to=to, **options, dry_run=True)


def inspect(
    source: PathLike,
    *,
    llm: str | None = None,
    visual_encoder: str | None = None,
    pretrained_pth: PathLike | None = None,
    config: PathLike | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    cache: bool = False,
) -> Inspection:
    """What a checkpoint is, what it lacks and what it can become; reads headers only."""
    return look(source, _source_options(llm, visual_encoder, pretrained_pth, config, lora_alpha, cache))


def verify(
    source: PathLike,
    out: PathLike,
    *,
    llm: str | None = None,
    visual_encoder: str | None = None,
    pretrained_pth: PathLike | None = None,
    config: PathLike | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    adapter: PathLike | Sequence[PathLike] | None = None,
    cache: bool = False,
    part: str = ALL,
    check: bool = False,
    strict: bool = False,
    progress: Reporter | OnBytes | None = None,
) -> Verdict:
    """Whether OUT holds the weights of SOURCE, tensor by tensor, whoever converted it.

    The verdict is true where it does. With `check` a difference raises `llava_convert.MismatchError`; with `strict`
    rows of the vocabulary that no record tells of are one.
    """
    options = _source_options(llm, visual_encoder, pretrained_pth, config, lora_alpha, cache, adapter)
    verdict = engine.verify(source, out, options, reporter(progress), part=part)
    if check:
        verdict.refuse(strict=strict)
    return verdict


def upload(
    folder: PathLike,
    repo: str,
    *,
    hub: str = HUGGINGFACE,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    verify: str = FULL,
    source: PathLike | None = None,
    llm: str | None = None,
    visual_encoder: str | None = None,
    pretrained_pth: PathLike | None = None,
    config: PathLike | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    cache: bool = False,
    include: Sequence[str] = (),
    progress: Reporter | OnBytes | None = None,
) -> tuple[Published, ...]:
    """Publish a folder, once it is proven to be what was converted; what each hub has then.

    The options are those of `llava-convert upload`. Raises `llava_convert.ConvertError`.
    """
    to = Destination(repo, named_hubs(hub), private, revision, create_pr, message or MESSAGE)
    options = _source_options(llm, visual_encoder, pretrained_pth, config, lora_alpha, cache)
    return publish_folder(
        Path(folder), to, reporter(progress), level=verify, source=source, options=options, include=tuple(include)
    )


def release(
    source: PathLike,
    name: str,
    *,
    hub: str = HUGGINGFACE,
    private: bool = False,
    only: str | Sequence[str] = (),
    out: PathLike | None = None,
    outtype: str | Sequence[str] | None = None,
    llm: str | None = None,
    visual_encoder: str | None = None,
    llm_id: str | None = None,
    visual_encoder_id: str | None = None,
    pretrained_pth: PathLike | None = None,
    config: PathLike | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    cache: bool = False,
    dry_run: bool = False,
    progress: Reporter | OnBytes | None = None,
) -> tuple[ReleaseItem, ...]:
    """Convert a model to every layout and publish each in a repository of its own: ORG/NAME and a suffix.

    With `dry_run` nothing is written or sent. Returns one item a layout, with its files and what each hub has. Raises
    `llava_convert.ConvertError`.
    """
    options = _source_options(llm, visual_encoder, pretrained_pth, config, lora_alpha, cache)
    named = replace(options.bases, llm_id=llm_id, visual_encoder_id=visual_encoder_id)
    wanted = Release(
        source,
        name,
        replace(options, bases=named),
        Destination(name, named_hubs(hub), private),
        only=tuple(word.strip() for word in only.split(",")) if isinstance(only, str) else tuple(only),
        out=_path(out),
        outtypes=type_names(outtype),
    )
    return tuple(plan_release(wanted) if dry_run else run_release(wanted, reporter(progress)))


def _source_options(
    llm: str | None,
    visual_encoder: str | None,
    pretrained_pth: PathLike | None,
    config: PathLike | None,
    lora_alpha: float | Mapping[str, float] | None,
    cache: bool,
    adapter: PathLike | Sequence[PathLike] | None = None,
) -> SourceOptions:
    return SourceOptions(
        adapter=_names(adapter),
        config=_path(config),
        pretrained_pth=_path(pretrained_pth),
        bases=Bases(llm, visual_encoder, lora_alpha=_alpha(lora_alpha), cache=cache),
    )


def _names(value: PathLike | Sequence[PathLike] | None) -> tuple[str, ...]:
    """One name, or several."""
    if value is None:
        return ()
    return (str(value),) if isinstance(value, str | Path) else tuple(map(str, value))


def _alpha(value: float | Mapping[str, float] | None) -> dict[str, float]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(("llm", "visual-encoder"), float(value))


def type_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """`f16,q4_k_m`, or a list of such."""
    names = value.split(",") if isinstance(value, str) else value or ()
    return tuple(name.strip() for name in names if name.strip() not in ("", "auto"))


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)


# A flag, and a word after it that is its value: a placeholder, a path, a list of choices, or what an error names.
_FLAG = re.compile(
    r"`[^`]*`|(?P<out>(?<![\w-])-o\b)"
    r"|(?<![\w-])--(?P<flag>[a-z][a-z-]*)(?![\w-])"
    r"(?: (?P<value>[A-Z][A-Z|]*\b|b?float(?:16|32)\b|\S*[/|.=]\S*|\S+:(?= )))?"
)


def in_keywords(text: str) -> str:
    """A message in the words of Python: `--dtype fp8: …` becomes `dtype=fp8: …`. Commands between backticks stay."""

    def keyword(found: re.Match[str]) -> str:
        if found["out"]:
            return "out"
        flag, value = found["flag"], found["value"]
        name = (flag or "").replace("-", "_")
        if flag is None or name not in _keywords():
            return found[0]
        return f"{name}={value}" if value is not None else f"{name}=True" if name in _switches() else name

    return _FLAG.sub(keyword, text)


@cache
def _keywords() -> frozenset[str]:
    functions = (convert, inspect, verify, upload, release)
    return frozenset(name for function in functions for name in signature(function).parameters)


@cache
def _switches() -> frozenset[str]:
    return frozenset(name for name, one in signature(convert).parameters.items() if one.default is False)


def of_python(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose errors, notes and warnings speak of keywords, not of the command's flags."""

    @wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        try:
            found = function(*arguments, **keywords)
        except ConvertError as problem:
            problem.reword(in_keywords)
            raise
        return _reworded(found) if isinstance(found, Report) else found  # type: ignore[return-value]

    return call


def _reworded(found: Report) -> Report:
    notes, warnings = (tuple(map(in_keywords, texts)) for texts in (found.notes, found.warnings))
    return replace(found, notes=notes, warnings=warnings)
