"""Everything that a command can be told. The command line and the keywords of Python are made of these classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.flags import AUTO, CHECKS, OUTPUT, PUBLISH, RUN, SOURCE, Flag, Flagged, as_names
from llava_convert.core.text import printable
from llava_convert.core.values import dataclass
from llava_convert.layouts.info import LAYOUTS, TARGETS, layout_named
from llava_convert.model.options import (
    DROP,
    DTYPES,
    FULL,
    OFF,
    OTHER_DTYPES,
    QUICK,
    OutputOptions,
    PartOption,
    TargetOptions,
)
from llava_convert.storage.files import read_file
from llava_convert.storage.hubs import HUBS, HUGGINGFACE, Destination
from llava_convert.storage.json_files import parse_json

if TYPE_CHECKING:
    from llava_convert.model.recipe import Bases

PathLike = str | Path
_MOST_TEMPLATE = 1 << 20
BOTH = "both"  # what `--hub` calls every row of HUBS

# What may be the name of a file: no separator of any system, no control character, and more than dots.
_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")
_NAME = re.compile(r"(?![. ]*$)[^/\\\x00-\x1f\x7f]+")
_ALPHAS = ("llm", "visual-encoder")


@dataclass(frozen=True, kw_only=True)
class OutOptions(Flagged):
    """What is made, and where."""

    to: Annotated[
        str,
        Flag(
            "Layout to convert to, or a program that loads it: "
            f"{', '.join(loader for info in LAYOUTS.values() for loader in info.loaders)}.",
            choices=tuple(TARGETS),
        ),
    ]
    out: Annotated[
        PathLike | None,
        Flag(
            "Output folder, or a URL (s3://…). Default: ./<source's stem>_<layout>.", OUTPUT, metavar="OUT", short="-o"
        ),
    ] = None
    name: Annotated[
        str | None, Flag("Model name in the card. Default: the last part of OUT.", OUTPUT, metavar="NAME")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Flagged):
    """How to read a source. None means that the source says it itself."""

    llm: Annotated[
        str | None,
        Flag("Base language model, if the source lacks its weights.", SOURCE, metavar="PATH|ID"),
    ] = None
    visual_encoder: Annotated[
        str | None, Flag("Base vision tower, if the source lacks its weights.", SOURCE, metavar="PATH|ID")
    ] = None
    base: Annotated[
        str | None,
        Flag("The whole LLaVA that the source was trained from, in any layout.", SOURCE, metavar="PATH|ID"),
    ] = None
    projector: Annotated[
        PathLike | None,
        Flag(
            "The projector, if the source lacks it: a file, or a model of any layout that holds one.",
            SOURCE,
            metavar="PATH|ID",
        ),
    ] = None
    pretrained_pth: Annotated[
        PathLike | None,
        Flag("Stage-1 checkpoint, for parts that were trained in stage 1.", SOURCE, metavar="PATH"),
    ] = None
    config: Annotated[
        PathLike | None,
        Flag(
            "xtuner training config, if the checkpoint carries none. It is read, never run.", SOURCE, metavar="CFG.py"
        ),
    ] = None
    config_from: Annotated[
        PathLike | None,
        Flag(
            "Folder with config.json and tokenizer, for weights that have none beside them.",
            SOURCE,
            metavar="FOLDER",
        ),
    ] = None
    mmproj: Annotated[
        PathLike | None,
        Flag("GGUF of vision tower and projector, if it is not beside SOURCE.", SOURCE, metavar="FILE"),
    ] = None
    lora_alpha: Annotated[
        str | float | Mapping[str, float] | None,
        Flag(
            "LoRA alpha, if nothing states it or the stated one is wrong: one number, or llm=N,visual-encoder=M.",
            SOURCE,
            metavar="N",
        ),
    ] = None
    adapter: Annotated[
        PathLike | Sequence[PathLike] | None,
        Flag(
            "PEFT adapter to merge. Repeatable. none: ignore adapters that lie beside the model.",
            SOURCE,
            metavar="DIR",
            repeated=True,
        ),
    ] = None
    extra: Annotated[
        str,
        Flag(
            "Tensors that no table knows. error: stop (the default); drop: leave them out.",
            SOURCE,
            choices=("error", DROP),
        ),
    ] = "error"
    vocab: Annotated[
        str | None,
        Flag(
            "If embedding and vocabulary differ in size: rows keeps the rows of the weights, tokens the tokenizer's.",
            SOURCE,
            choices=("rows", "tokens"),
        ),
    ] = None
    table: Annotated[
        PathLike | Sequence[PathLike] | None,
        Flag(
            "Your own table: rows of a layout, a family, or more names of a family. Repeatable.",
            SOURCE,
            metavar="FILE.toml",
            repeated=True,
        ),
    ] = None
    cache: Annotated[
        bool,
        Flag("Download a hub's model to the hub's cache first, instead of reading it in place.", SOURCE),
    ] = False
    source_layout: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _alphas(self.lora_alpha)
        if self.source_layout is not None:
            object.__setattr__(self, "source_layout", layout_named(self.source_layout).name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The folders of adapters to merge, in order; `none` leaves out those that lie beside the model."""
        return as_names(self.adapter)

    @property
    def tables(self) -> tuple[Path, ...]:
        """The user's own tables."""
        return tuple(map(Path, as_names(self.table)))

    @property
    def bases(self) -> Bases:
        """What the user says of the base models."""
        from llava_convert.model.recipe import Bases

        return Bases(self.llm, self.visual_encoder, lora_alpha=_alphas(self.lora_alpha), cache=self.cache)


@dataclass(frozen=True, kw_only=True)
class AskOptions(SourceOptions):
    """How to run a model."""

    runtime: Annotated[
        str | None,
        Flag(
            "Program that runs the model. Default: llama.cpp for GGUF, else transformers, which runs GGUF too.",
            RUN,
            choices=(AUTO, "transformers", "llama.cpp"),
        ),
    ] = None
    device: Annotated[str | None, Flag("Default: a GPU, if there is one.", RUN, choices=(AUTO, "cpu", "cuda"))] = None
    dtype: Annotated[
        str | None,
        Flag(
            "Dtype to compute in. Default: float32 on a CPU; on a GPU the model's own 16-bit dtype, else float16.",
            RUN,
            choices=(AUTO, *DTYPES),
            others=OTHER_DTYPES,
        ),
    ] = None
    four_bit: Annotated[
        bool, Flag("Load the language model in 4 bits (NF4, bitsandbytes).", RUN, spelling="--4bit")
    ] = False
    prompt_template: Annotated[
        str | None,
        Flag("Prompt template, by its name in xtuner. Default: the one used in training.", RUN, metavar="NAME"),
    ] = None
    max_new_tokens: Annotated[int, Flag("Maximum length of an answer, in tokens.", RUN, metavar="N")] = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class NamedBases(SourceOptions):
    """How to read a source, and what its base models are called on a hub."""

    llm_id: Annotated[str | None, Flag("Hub id of the language model, written into configs.", OUTPUT, metavar="ID")] = (
        None
    )
    visual_encoder_id: Annotated[
        str | None, Flag("Hub id of the vision tower, written into configs.", OUTPUT, metavar="ID")
    ] = None

    @property
    def bases(self) -> Bases:
        return replace(super().bases, llm_id=self.llm_id, visual_encoder_id=self.visual_encoder_id)


@dataclass(frozen=True, kw_only=True)
class HubOptions(Flagged):
    """Where to publish."""

    hub: Annotated[
        str | None,
        Flag(
            "Where to upload, with the token of the hub's own client. Default: huggingface.",
            PUBLISH,
            choices=(*HUBS, BOTH),
        ),
    ] = None
    private: Annotated[bool, Flag("Create the repository as private.", PUBLISH)] = False

    @property
    def hubs(self) -> tuple[str, ...]:
        return tuple(HUBS) if self.hub == BOTH else (self.hub or HUGGINGFACE,)

    def destination(self, repo: str) -> Destination:
        return Destination(repo, self.hubs, self.private)


@dataclass(frozen=True, kw_only=True)
class BranchOptions(HubOptions):
    """Where to publish, and as what."""

    revision: Annotated[str | None, Flag("Upload to this branch.", PUBLISH, metavar="BRANCH")] = None
    create_pr: Annotated[bool, Flag("Upload as a pull request (only Hugging Face).", PUBLISH)] = False

    def destination(self, repo: str, message: str | None = None) -> Destination:
        to = super().destination(repo)
        return replace(to, revision=self.revision, create_pr=self.create_pr, message=message or to.message)


@dataclass(frozen=True, kw_only=True)
class PushOption(Flagged):
    """Whether to publish what was made."""

    push: Annotated[
        str | None, Flag("Upload OUT to this repository once every byte is verified.", PUBLISH, metavar="REPO")
    ] = None


@dataclass(frozen=True, kw_only=True)
class PushOptions(BranchOptions, PushOption):
    """Whether to publish what was made, and where."""

    @property
    def repo(self) -> str | None:
        """What the output is going to be called on a hub (ms://… on ModelScope): its card's commands name that."""
        return None if self.push is None else self.destination(self.push).address


@dataclass(frozen=True, kw_only=True)
class Options(PushOptions, OutputOptions, PartOption, NamedBases, OutOptions):
    """Everything that a conversion can be told. None means the default, which depends on source and target.

    `asked` is the word that stood for the layout, where that was another. `shared` says that the options are those of
    several jobs: one that has no effect on this job is then no error.
    """

    shared: ClassVar[bool] = False

    allow_key: Annotated[
        str | Sequence[str] | None,
        Flag("Drop this config key that no table knows. Repeatable.", SOURCE, metavar="NAME", repeated=True),
    ] = None
    dequantize: Annotated[bool, Flag("Turn a quantised source into floats; the quantisation error stays.", SOURCE)] = (
        False
    )
    verify: Annotated[
        str | None,
        Flag(
            "quick: check headers and files. full: recompute every byte. Default: quick; with --push full.",
            CHECKS,
            choices=(QUICK, FULL, OFF),
        ),
    ] = None
    digest: Annotated[bool, Flag("Record an xxh3-128 digest of each tensor in conversion.json.", CHECKS)] = False
    force: Annotated[bool, Flag("Replace OUT. The old one survives any failure.", CHECKS)] = False
    resume: Annotated[bool, Flag("Keep the shards that a killed run of the same command finished.", CHECKS)] = False
    files: Annotated[
        str | None,
        Flag("Write one share of the files; other runs write the rest of OUT.", CHECKS, metavar="I/N"),
    ] = None
    finish: Annotated[bool, Flag("Check that every share is written, and complete OUT.", CHECKS)] = False
    executor: Annotated[
        str | None,
        Flag(
            "Dask scheduler whose workers write the files, or `dask://local?workers=N` on this machine.",
            CHECKS,
            metavar="dask://HOST:PORT",
        ),
    ] = None
    threads: Annotated[
        int, Flag("Number of threads. 0: one per core, at most 4. The bytes stay the same.", CHECKS, metavar="N")
    ] = 0
    asked: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        layout = layout_named(self.to)
        if self.to.strip().lower() != layout.name:
            object.__setattr__(self, "asked", self.to)
        object.__setattr__(self, "to", layout.name)
        super().__post_init__()
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError(f"--name {printable(self.name)}: give a name, not a path", hint="-o says where")
        if self.push is None and (self.hub or self.private or self.revision is not None or self.create_pr):
            raise UsageError(
                "--hub, --private, --revision and --create-pr say how to publish", hint="--push REPO publishes"
            )
        if self.files is not None:
            number, count = self.share or (0, 0)
            if not 1 <= number <= count:
                raise UsageError(f"--files {self.files}: give a share and the number of shares, such as 3/16")
            if self.resume:
                raise UsageError(
                    f"--resume does not apply to a share (--files {self.files})",
                    hint="leave it out: a share keeps what is there already",
                )
            if self.finish or self.push is not None:
                flag = "--finish" if self.finish else "--push"
                raise UsageError(
                    f"{flag} does not apply to a share (--files {self.files})",
                    hint="run it once all shares are there: the same command with --finish in place of --files",
                )
        if self.executor is not None and (self.files is not None or self.finish):
            flag = "--finish" if self.finish else "--files"
            raise UsageError(f"{flag} does not apply with --executor", hint="leave it out: the executor does all of it")
        if self.finish and self.resume:
            raise UsageError(
                "--finish and --resume do not go together",
                hint="--finish completes OUT; --resume makes what is missing, too",
            )
        if self.push is not None and self.verify == QUICK:
            raise UsageError(
                f"--push with --verify {QUICK}: what is published is verified in full", hint=f"or --verify {OFF}"
            )

    @property
    def level(self) -> str:
        """How much is verified."""
        return self.verify or (QUICK if self.push is None else FULL)

    @property
    def share(self) -> tuple[int, int] | None:
        """Which share of the files is written, from 1, and of how many; None for all of them."""
        found = _SHARE.fullmatch(self.files or "")
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def allowed_keys(self) -> tuple[str, ...]:
        """The keys of configs that no table knows and that may be left behind."""
        return as_names(self.allow_key)

    @property
    def target(self) -> TargetOptions:
        """What the layout is told. Raises InputError for a file of `--chat-template` that is none."""
        told = {one.name: getattr(self, one.name) for one in fields(OutputOptions)}
        return TargetOptions(part=self.part, **{**told, "chat_template": read_template(self.chat_template)})

    @classmethod
    def of(cls, source: SourceOptions, to: str, **more: Any) -> Self:
        """The options of a conversion of what `source` reads."""
        kind = NamedBases if isinstance(source, NamedBases) else SourceOptions
        return cls(**{one.name: getattr(source, one.name) for one in fields(kind)}, to=to, **more)


def _alphas(value: str | float | Mapping[str, float] | None) -> dict[str, float]:
    """The alpha of each part: `16` is of both, `llm=256,visual-encoder=16` of each its own. Raises UsageError."""
    if value is None:
        return {}
    try:
        if isinstance(value, Mapping):
            found = {str(part): float(alpha) for part, alpha in value.items()}
        elif isinstance(value, str) and "=" in value:
            found = {part.strip(): float(alpha) for part, alpha in (pair.split("=") for pair in value.split(","))}
        else:
            found = dict.fromkeys(_ALPHAS, float(value))
    except ValueError:
        found = {"": 0.0}
    if not set(found) <= set(_ALPHAS) or not all(0 < alpha < 1e9 for alpha in found.values()):
        raise UsageError(f"--lora-alpha {value}: give a number above 0", hint="write 16, or llm=256,visual-encoder=16")
    return found


def read_template(file: PathLike | None) -> str | None:
    """The chat template in a file: Jinja, or the `chat_template` of a JSON file (tokenizer_config.json).

    Raises InputError where it cannot be read or holds none.
    """
    if file is None:
        return None
    path = Path(file).expanduser()
    text = read_file(path, _MOST_TEMPLATE).decode("utf-8", "replace")
    if path.suffix == ".json":
        found = parse_json(text.encode(), str(path))
        text = found.get("chat_template", "") if isinstance(found, dict) else ""
    if not isinstance(text, str) or "{" not in text:
        raise InputError(
            f"{printable(path)}: holds no chat template",
            hint="give a Jinja file (chat_template.jinja), or a tokenizer_config.json that has a chat_template",
        )
    return text
