"""What `--json` prints: one object a command, described key by key, and its JSON Schema.

`make docs` writes docs/json.md and docs/schemas out of this; tests hold the real output of every command to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class Document(TypedDict):
    """Every document begins so."""

    schema: Annotated[Literal[1], "version of this description; keys may be added to it, none goes or changes"]
    command: Annotated[str | None, "the command; null where none was recognised"]
    seconds: Annotated[float, "how long it ran"]


class Error(Document):
    """An error, of any command: also a usage error, an interruption, or a bug."""

    error: Annotated[str, "what was found, where, and what was expected"]
    hint: Annotated[str | None, "what fixes it"]
    exit_code: Annotated[int, "the exit status of the command"]


class File(TypedDict):
    """A file of an output."""

    name: Annotated[str, "its path in the output folder"]
    bytes: Annotated[int, "its size"]
    tensors: Annotated[int | None, "how many tensors it holds; null for a file without weights"]


class Dropped(TypedDict):
    """A tensor of the source that is not in the output."""

    name: Annotated[str, "its name in the source"]
    reason: Annotated[str, "why"]


class Published(TypedDict):
    """A folder on a hub."""

    hub: Annotated[str, "as `--hub` names it"]
    repo: Annotated[str, "OWNER/NAME"]
    url: str
    revision: str
    commit: Annotated[str | None, "null where the hub names none"]
    count: Annotated[int, "how many files are there"]
    bytes: Annotated[int, "their size"]
    skipped: Annotated[int, "how many of them were there before"]
    compared: Annotated[bool, "whether the hub's own listing says that all are as they are here"]


class Story(TypedDict):
    """A part of an output."""

    detail: Annotated[str, "where it comes from, in words"]


class Convert(Document):
    """A conversion, or with `--dry-run` its plan: `convert`, `merge`, and the commands that are named by layouts."""

    source: Annotated[str, "what was converted"]
    layout: Annotated[str, "the layout of the source"]
    why: Annotated[str, "how it was recognised"]
    out: Annotated[str, "the output"]
    to: Annotated[str, "the layout of the output"]
    done: Annotated[bool, "whether OUT is complete: false for a dry run, and for a share of it"]
    dtype: Annotated[str, "of the language model in the output; several are joined by commas"]
    source_dtype: Annotated[str, "of most of the language model in the source"]
    parts: Annotated[Mapping[str, Story], "by part: llm, visual-encoder, projector"]
    tensors: Annotated[int, "how many the output holds"]
    ops: Annotated[Mapping[str, int], "how many tensors each op makes"]
    files: Annotated[list[File], "every file of the output"]
    bytes: Annotated[int, "their sizes together"]
    bytes_read: Annotated[int, "of weights"]
    bytes_fetched: Annotated[int, "over the network"]
    unchecked: Annotated[list[str], "files of a hub that were read in parts, so that their sha256 was not compared"]
    peak_memory: Annotated[int, "an estimate, in bytes"]
    share: Annotated[list[str] | None, "with `--files`: the files of the share"]
    estimated_seconds: Annotated[float | None, "how long it may take; null where a network decides"]
    disk_free: Annotated[int | None, "bytes that are free where the output goes; null for a store"]
    verified: Annotated[Literal["quick", "full", "off"], "how much was verified, or would be"]
    flushed_to_zero: Annotated[int, "values that became zero in a cast"]
    dropped: Annotated[list[Dropped], "tensors of the source that are not in the output"]
    notes: list[str]
    warnings: list[str]
    plan: Annotated[str, "a hash of all that decides the bytes of the output"]
    next: Annotated[str, "what to try first: a command, or a line of Python"]
    published: Annotated[list[Published], "with `--push`: what each hub has"]


class Part(TypedDict):
    """A part of a source."""

    state: Annotated[str, "full, adapter or absent"]
    tensors: int
    bytes: int
    dtypes: list[str]
    detail: Annotated[str, "its adapter and its base model, in words"]


class Reachable(TypedDict):
    """Whether a source can become a layout."""

    possible: bool
    missing: Annotated[str | None, "why not, and what supplies it"]


class Inspect(Document):
    """What `inspect` found."""

    source: Annotated[str, "what was looked at"]
    layout: Annotated[str | None, "its layout; null for what is not a checkpoint that can be converted"]
    why: Annotated[str, "how it was recognised"]
    kind: Annotated[str, "what it is, in words"]
    use: Annotated[str, "what it can be used for"]
    next: Annotated[str, "the command to type next; words in capitals are to be filled in"]
    parts: Annotated[Mapping[str, Part], "by part: llm, visual-encoder, projector"]
    settings: Annotated[Mapping[str, Any], "facts of the model that its files state"]
    targets: Annotated[Mapping[str, Reachable], "by layout, what it can become"]
    details: Annotated[list[str], "what `--verbose` adds"]
    bytes_fetched: Annotated[int, "over the network"]
    notes: list[str]
    warnings: list[str]


class Gap(TypedDict):
    """How far a tensor differs."""

    elements: NotRequired[Annotated[int, "how many differ"]]
    largest: NotRequired[Annotated[float | None, "the largest difference; null where it is not a number"]]
    shapes: NotRequired[Annotated[list[list[int]], "both shapes, where these differ, and nothing else"]]


class Sides(TypedDict):
    """A fact that both sides state otherwise."""

    source: Any
    out: Any


class Site(TypedDict):
    """How far two models are apart at one place of the computation."""

    name: Annotated[str, "prompt, pixels, a layer, features, projector, logits, logits of text or logits of pictures"]
    largest: Annotated[float | None, "the largest difference; null where the shapes differ"]
    relative: Annotated[float | None, "as a share of the largest value there"]


class Said(TypedDict):
    """What two models said to the same."""

    probe: Annotated[str, "which picture"]
    source: Annotated[str, "the source's greedy answer"]
    out: Annotated[str, "the output's"]
    kl: Annotated[float, "mean divergence of the logits, in nats"]
    top1: Annotated[float, "share of positions with the same first choice"]
    parts_at: Annotated[int | None, "the first token that differs; null where none does"]


class Logits(TypedDict):
    """What `--logits` found."""

    same: Annotated[bool, "whether rounding explains every difference"]
    dtype: Annotated[str, "the dtype that explains it"]
    bound: Annotated[float, "how much that is, as a share of the largest value"]
    runtime: Annotated[str, "what computed the output: this package, or the program of `--runtime`"]
    not_shown: Annotated[str, "what that program does not show; empty where it shows all"]
    parts_at: Annotated[str | None, "the first site beyond it; null where there is none"]
    sites: list[Site]
    answers: list[Said]


class Verify(Document):
    """What `verify` found. Where the models differ, the command ends with 7."""

    source: str
    layout: Annotated[str, "the layout of the source"]
    out: str
    to: Annotated[str, "the layout of the output"]
    same: Annotated[bool, "whether the models are the same"]
    equal: Annotated[int, "how many tensors are equal bit for bit"]
    different: Annotated[Mapping[str, Gap], "by tensor"]
    rounded: Annotated[Mapping[str, Gap], "tensors that differ as another order of rounding makes them"]
    missing: Annotated[list[str], "tensors that the output lacks"]
    extra: Annotated[list[str], "tensors that the source does not have"]
    added_rows: Annotated[Mapping[str, int], "rows of the vocabulary beyond the source's"]
    unrecorded_rows: Annotated[Mapping[str, int], "those of them that no record tells of"]
    facts: Annotated[Mapping[str, Sides], "what the files state otherwise, by fact"]
    harmless: Annotated[Mapping[str, str], "differences that decide nothing, with the reason"]
    not_compared: list[str]
    defects: Annotated[list[str], "what readers of the output choke on"]
    synthetic: Annotated[list[str], "tensors that the source's layout never has"]
    quantised: Annotated[int, "how many of the equal tensors are the source's quantisation, recomputed"]
    logits: Annotated[Logits | None, "with `--logits`: what both models made of the same pictures and prompts"]
    warnings: list[str]


class Trouble(TypedDict):
    """One thing that a program trips over."""

    rule: str
    what: Annotated[str, "what is wrong, and where"]
    source: Annotated[str, "where it is known from"]
    fixable: Annotated[bool, "whether `--fix` repairs it"]
    fixed: Annotated[bool, "whether it did"]
    hint: Annotated[str, "what else helps; may be empty"]


class Doctor(Document):
    """What `doctor` found. Where something is left, the command ends with 7."""

    source: Annotated[str, "the folder"]
    layout: Annotated[str, "its layout"]
    consumer: Annotated[str, "the program, as `--for` names it"]
    sound: Annotated[bool, "true if no problem is left"]
    troubles: list[Trouble]
    changed: Annotated[list[str], "files that were repaired"]
    backup: Annotated[str | None, "the folder as it was, where something was repaired"]


class Chat(Document):
    """What a model answered to one question."""

    source: Annotated[str, "what was asked"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    prompt: str
    images: Annotated[list[str], "the pictures, as they were given"]
    answer: str
    tokens: Annotated[int, "how many the answer took"]
    stopped: Annotated[bool, "false where the answer reached `--max-new-tokens`"]


class EvalCompare(Document):
    """What `eval compare` found."""

    source: Annotated[str, "the folder of a run"]
    out: Annotated[str, "that of the other"]
    report: Annotated[str, "the page"]
    questions: int
    changed: Annotated[int, "how many answers differ"]
    averages: Annotated[list[float] | None, "of each run; null for a TEST file"]


class Score(TypedDict):
    """A number that lmms-eval found."""

    task: str
    metric: str
    value: float


class EvalTasks(Document):
    """What `eval TASKS` found."""

    source: Annotated[str, "the model"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    out: Annotated[str, "the folder with results.csv and results.json"]
    scores: list[Score]
    table: Annotated[str, "one row, in Markdown"]


class EvalMmbench(Document):
    """What `eval mmbench` found."""

    source: Annotated[str, "the model"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    data: Annotated[str, "the file of questions"]
    out: Annotated[str, "the folder of answers and scores"]
    questions: Annotated[int, "rows of the file, circular copies among them"]
    resumed: Annotated[int, "how many of them an earlier run had answered"]
    scores: Annotated[
        Mapping[str, float] | None, "share of right questions by ability, Average first; null for a TEST file"
    ]


class Upload(Document):
    """What `upload` did."""

    source: Annotated[str, "the folder"]
    published: list[Published]


class ReleaseLayout(TypedDict):
    """One layout of a release."""

    layout: str
    repo: Annotated[str, "OWNER/NAME"]
    out: Annotated[str, "its folder"]
    conversion: Literal["convert", "there already", "as it is"]
    files: Annotated[list[File], "what is published"]
    bytes: Annotated[int, "their sizes together"]
    published: list[Published]


class Release(Document):
    """What `release` did, or with `--dry-run` would do."""

    source: str
    name: Annotated[str, "ORG/NAME"]
    hubs: Annotated[list[str], "as `--hub` names them"]
    done: Annotated[bool, "false for a dry run"]
    layouts: list[ReleaseLayout]


class SweepCheckpoint(TypedDict):
    """One checkpoint of a sweep."""

    source: str
    out: str
    state: Literal["converted", "there already", "not complete", "refused", "to convert"]
    said: Annotated[str, "why, where it was not converted"]
    copied: Annotated[int, "how many files are those of an earlier step"]
    exit_code: Annotated[int, "that of its conversion alone"]


class Sweep(Document):
    """What `sweep` did, or with `--dry-run` would do."""

    source: Annotated[str, "the pattern"]
    done: Annotated[bool, "false for a dry run"]
    checkpoints: list[SweepCheckpoint]


Family = TypedDict(
    "Family",
    {
        "part": Annotated[str, "the part that it is a family of"],
        "model_types": Annotated[list[str], "its names in configs"],
        "as": Annotated[list[str], "families that its models can be written as (`--as`)"],
        "called": Annotated[Mapping[str, str], "by layout, what it is called there"],
    },
)


class Quantized(TypedDict):
    """A way in which other programs pack weights."""

    name: str
    becomes_floats: Annotated[bool, "whether `--dequantize` makes floats of it"]


class Layouts(Document):
    """What this version knows."""

    sources: Annotated[Mapping[str, list[str]], "by layout, the dialects of its names"]
    targets: list[str]
    families: Mapping[str, Family]
    outtypes: Annotated[list[str], "types of GGUF files, as `--outtype` names them"]
    quantizations: Annotated[list[Quantized], "what other programs pack weights with, as far as it is known by name"]
    templates: Annotated[list[str], "prompt templates, as `--prompt-template` names them"]
    recipes: Annotated[list[str], "recipes of `train`"]
    ops: list[str]


class Counts(TypedDict):
    """Parameters of a part."""

    all: int
    trained: int


class Stage(TypedDict):
    """A stage of a training."""

    name: str
    sets: NotRequired[Annotated[Mapping[str, int], "conversations that are trained on, by data set"]]
    pictures: NotRequired[int]
    iterations: NotRequired[Annotated[int | None, "null where the data are not complete"]]
    steps: NotRequired[int | None]
    parameters: NotRequired[Annotated[Mapping[str, Counts] | None, "null where a base model is unknown here"]]
    weights_bytes: NotRequired[int | None]
    optimizer_bytes: NotRequired[int | None]
    start: NotRequired[Annotated[str, "what the stage starts from"]]
    missing: NotRequired[Annotated[list[str], "what has to be there before it can be trained"]]


class Known(TypedDict):
    """A recipe that comes with the package."""

    name: str
    stage: str
    trains: str
    model: str
    data: str
    memory: str


class Train(Document):
    """What `train` did, or with `--dry-run` would do."""

    done: Annotated[bool, "false for a dry run"]
    out: Annotated[str | None, "the last checkpoint; null for a dry run"]
    stages: Annotated[list[Stage], "what a dry run counts stands beside the name"]
    recipes: NotRequired[Annotated[list[Known], "with --list"]]


class Set(TypedDict):
    """A data set of a recipe."""

    name: str
    file: str
    rows: int
    kept: Annotated[int, "rows that are trained on"]
    pictures: Annotated[int, "those of them that see a picture"]
    left_out: Annotated[Mapping[str, int], "rows and parts of rows that nothing is learnt from, by reason"]
    missing: Annotated[Mapping[str, int], "how many pictures are missing, by folder"]
    broken: Annotated[Mapping[str, str], "with --open: pictures that cannot be read, and why"]
    problem: Annotated[str, "what training refuses the set for; empty where it takes it"]
    absent: Annotated[list[str], "some of the pictures that are missing"]


class DataCheck(Document):
    """What `data check` found."""

    sets: list[Set]


class DataFixOcrvqa(Document):
    """What `data fix-ocrvqa` did."""

    copied: int
    there: Annotated[int, "pictures that had a .jpg already"]


DOCUMENTS: Mapping[str, Any] = {
    "error": Error,
    "convert": Convert,
    "inspect": Inspect,
    "verify": Verify,
    "doctor": Doctor,
    "chat": Chat,
    "eval-mmbench": EvalMmbench,
    "eval-tasks": EvalTasks,
    "eval-compare": EvalCompare,
    "upload": Upload,
    "release": Release,
    "sweep": Sweep,
    "layouts": Layouts,
    "train": Train,
    "data-check": DataCheck,
    "data-fix-ocrvqa": DataFixOcrvqa,
}

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a document."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"llava-convert {name} --json"}
    return about | schema_of(DOCUMENTS[name])


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type that these documents are made of."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {
            "type": "object",
            **({"description": kind.__doc__.strip()} if kind.__doc__ else {}),
            "properties": {key: schema_of(hint) for key, hint in hints.items()},
            "required": [key for key, hint in hints.items() if get_origin(hint) is not NotRequired],
        }
    if origin is NotRequired:
        return schema_of(args[0])
    if origin is Annotated:
        return schema_of(args[0]) | {"description": args[1]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is UnionType:
        return {"anyOf": [schema_of(one) for one in args]}
    if origin is list:
        return {"type": "array", "items": schema_of(args[0])}
    return {"type": "object", "additionalProperties": schema_of(args[1])}
