"""The JSON objects that `--json` prints, one for each command, described key by key, and their JSON Schemas.

`make docs` writes docs/json.md and docs/schemas from them. Tests check the real output of every command against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class Document(TypedDict):
    """The keys with which every document begins."""

    schema: Annotated[
        Literal[1],
        "the version of this description; within one version keys may be added, but none is removed or changed",
    ]
    command: Annotated[str | None, "the command; null if none was recognised"]
    seconds: Annotated[float, "the run time in seconds"]


class Error(Document):
    """An error of any command. Usage errors, interruptions and bugs are included."""

    error: Annotated[str, "the message: what was found, where, and what was expected"]
    hint: Annotated[str | None, "how to fix it"]
    exit_code: Annotated[int, "the exit status of the command"]


class File(TypedDict):
    """A file of an output."""

    name: Annotated[str, "its path in the output folder"]
    bytes: Annotated[int, "its size"]
    tensors: Annotated[int | None, "the number of its tensors; null for a file without weights"]


class Dropped(TypedDict):
    """A tensor of the source that is not in the output."""

    name: Annotated[str, "its name in the source"]
    reason: Annotated[str, "why it was dropped"]


class Published(TypedDict):
    """A folder on a hub."""

    hub: Annotated[str, "the name of the hub, as for `--hub`"]
    repo: Annotated[str, "OWNER/NAME"]
    url: str
    revision: str
    commit: Annotated[str | None, "null if the hub has none"]
    count: Annotated[int, "the number of files there"]
    bytes: Annotated[int, "their total size"]
    skipped: Annotated[int, "how many of them were there already"]
    compared: Annotated[bool, "true if the listing of the hub shows the same files as here"]


class Story(TypedDict):
    """A part of an output."""

    detail: Annotated[str, "its origin, in words"]


class Convert(Document):
    """A conversion, or with `--dry-run` its plan. `convert`, `merge` and the commands named like a layout print it."""

    source: Annotated[str, "the source"]
    layout: Annotated[str, "the layout of the source"]
    why: Annotated[str, "how the layout was recognised"]
    out: Annotated[str, "the output"]
    to: Annotated[str, "the layout of the output"]
    done: Annotated[bool, "true if OUT is complete; false for a dry run and for a share"]
    dtype: Annotated[str, "the dtype of the language model in the output; several are separated by commas"]
    source_dtype: Annotated[str, "the dtype of most tensors of the language model in the source"]
    parts: Annotated[Mapping[str, Story], "by part: llm, visual-encoder, projector"]
    tensors: Annotated[int, "the number of tensors in the output"]
    ops: Annotated[Mapping[str, int], "by op, the number of tensors that it makes"]
    files: Annotated[list[File], "every file of the output"]
    bytes: Annotated[int, "their sizes together"]
    bytes_read: Annotated[int, "bytes of weights that were read"]
    bytes_fetched: Annotated[int, "over the network"]
    unchecked: Annotated[list[str], "files of a hub that were read only in part, so their sha256 was not compared"]
    peak_memory: Annotated[int, "estimated peak memory, in bytes"]
    share: Annotated[list[str] | None, "with `--files`: the files of the share"]
    estimated_seconds: Annotated[float | None, "the expected run time; null if it depends on a network"]
    disk_free: Annotated[int | None, "free bytes on the disk of the output; null for a store"]
    verified: Annotated[
        Literal["quick", "full", "off"], "the level of the check; of a dry run, the level that would be used"
    ]
    flushed_to_zero: Annotated[int, "how many values became zero in a cast"]
    dropped: Annotated[list[Dropped], "tensors of the source that are not in the output"]
    notes: list[str]
    warnings: list[str]
    plan: Annotated[str, "a hash of everything that determines the bytes of the output"]
    next: Annotated[str, "the next step: a command, or a line of Python"]
    published: Annotated[list[Published], "with `--push`: the folder on each hub"]


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
    missing: Annotated[str | None, "if it is not possible: what is missing, and how to supply it"]


class Inspect(Document):
    """The result of `inspect`."""

    source: Annotated[str, "the file or the folder"]
    layout: Annotated[str | None, "its layout; null if it cannot be converted"]
    why: Annotated[str, "how it was recognised"]
    kind: Annotated[str, "its kind, in words"]
    use: Annotated[str, "what it can be used for"]
    next: Annotated[str, "the command to type next; replace words in capitals with your own values"]
    parts: Annotated[Mapping[str, Part], "by part: llm, visual-encoder, projector"]
    settings: Annotated[Mapping[str, Any], "settings of the model that its files state"]
    targets: Annotated[Mapping[str, Reachable], "by layout, whether it can be converted to it"]
    details: Annotated[list[str], "further findings, with `--verbose`"]
    bytes_fetched: Annotated[int, "over the network"]
    notes: list[str]
    warnings: list[str]


class Gap(TypedDict):
    """How much a tensor differs."""

    elements: NotRequired[Annotated[int, "the number of elements that differ"]]
    largest: NotRequired[Annotated[float | None, "the largest difference; null if it is not a number"]]
    shapes: NotRequired[Annotated[list[list[int]], "both shapes, if they differ; then the other keys are absent"]]


class Sides(TypedDict):
    """A fact that differs between source and output."""

    source: Any
    out: Any


class Site(TypedDict):
    """How much two models differ at one point of the computation."""

    name: Annotated[
        str, "the point: prompt, pixels, a layer, features, projector, logits, logits of text or logits of pictures"
    ]
    largest: Annotated[float | None, "the largest difference; null if the shapes differ"]
    relative: Annotated[float | None, "the same, divided by the largest value there"]


class Said(TypedDict):
    """The answers of two models to the same prompt."""

    probe: Annotated[str, "the picture"]
    source: Annotated[str, "the greedy answer of the source"]
    out: Annotated[str, "the greedy answer of the output"]
    kl: Annotated[float, "mean KL divergence of the logits, in nats"]
    top1: Annotated[float, "share of positions with the same most likely token"]
    parts_at: Annotated[int | None, "the position of the first token that differs; null if none does"]


class Logits(TypedDict):
    """The result of `--logits`."""

    same: Annotated[bool, "true if rounding explains every difference"]
    dtype: Annotated[str, "the dtype that explains it"]
    bound: Annotated[float, "the largest difference that rounding in this dtype explains, divided by the largest value"]
    runtime: Annotated[str, "the program that ran the output: this package, or the program of `--runtime`"]
    not_shown: Annotated[str, "the points that this program does not show; empty if it shows all"]
    parts_at: Annotated[str | None, "the first site with a difference above the bound; null if there is none"]
    sites: list[Site]
    answers: list[Said]


class Verify(Document):
    """The result of `verify`. If the models differ, the exit code is 7."""

    source: str
    layout: Annotated[str, "the layout of the source"]
    out: str
    to: Annotated[str, "the layout of the output"]
    same: Annotated[bool, "true if the models are the same"]
    equal: Annotated[int, "how many tensors are equal, bit for bit"]
    different: Annotated[Mapping[str, Gap], "by tensor, how much it differs"]
    rounded: Annotated[Mapping[str, Gap], "tensors whose difference is explained by another order of rounding"]
    missing: Annotated[list[str], "tensors that the output lacks"]
    extra: Annotated[list[str], "tensors that the source does not have"]
    added_rows: Annotated[Mapping[str, int], "by tensor, the rows that the output has beyond those of the source"]
    unrecorded_rows: Annotated[Mapping[str, int], "by tensor, how many of these rows no record lists"]
    facts: Annotated[Mapping[str, Sides], "facts that differ between the files of the two models"]
    harmless: Annotated[Mapping[str, str], "differences that change nothing, with the reason"]
    not_compared: list[str]
    defects: Annotated[list[str], "faults that programs fail on when they load the output"]
    synthetic: Annotated[list[str], "tensors that do not exist in the layout of the source"]
    quantised: Annotated[int, "how many of the equal tensors were compared with a new quantisation of the source"]
    logits: Annotated[Logits | None, "with `--logits`: the comparison of both models on the same pictures and prompts"]
    warnings: list[str]


class Trouble(TypedDict):
    """One problem that a program has with the folder."""

    rule: str
    what: Annotated[str, "what is wrong, and where"]
    source: Annotated[str, "where the problem is documented, or the evidence for it"]
    fixable: Annotated[bool, "true if `--fix` can repair it"]
    fixed: Annotated[bool, "true if `--fix` repaired it"]
    hint: Annotated[str, "another way to fix it; may be empty"]


class Doctor(Document):
    """The result of `doctor`. If a problem is left, the exit code is 7."""

    source: Annotated[str, "the folder"]
    layout: Annotated[str, "its layout"]
    consumer: Annotated[str, "the program, as for `--for`"]
    sound: Annotated[bool, "true if no problem is left"]
    troubles: list[Trouble]
    changed: Annotated[list[str], "files that were repaired"]
    backup: Annotated[str | None, "the copy of the folder before the repair; null if nothing was repaired"]


class Chat(Document):
    """The answer of a model to one question."""

    source: Annotated[str, "the model"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    prompt: str
    images: Annotated[list[str], "the pictures, as they were given"]
    answer: str
    tokens: Annotated[int, "the number of tokens in the answer"]
    stopped: Annotated[bool, "false if the answer reached `--max-new-tokens`"]


class EvalCompare(Document):
    """The result of `eval compare`."""

    source: Annotated[str, "the folder of the first run"]
    out: Annotated[str, "the folder of the second run"]
    report: Annotated[str, "the page with the comparison"]
    questions: int
    changed: Annotated[int, "how many answers differ"]
    averages: Annotated[list[float] | None, "the average score of each run; null for a TEST file"]


class Score(TypedDict):
    """A score from lmms-eval."""

    task: str
    metric: str
    value: float


class EvalTasks(Document):
    """The result of `eval TASKS`."""

    source: Annotated[str, "the model"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    out: Annotated[str, "the folder with results.csv and results.json"]
    scores: list[Score]
    table: Annotated[str, "the scores as one table row, in Markdown"]


class EvalMmbench(Document):
    """The result of `eval mmbench`."""

    source: Annotated[str, "the model"]
    layout: Annotated[str, "its layout"]
    runtime: Annotated[Literal["transformers", "llama.cpp"], "what computed"]
    data: Annotated[str, "the file of questions"]
    out: Annotated[str, "the folder of answers and scores"]
    questions: Annotated[int, "the number of rows in the file, with circular copies"]
    resumed: Annotated[int, "how many of them were answered by an earlier run"]
    scores: Annotated[
        Mapping[str, float] | None, "share of correct answers by ability, Average first; null for a TEST file"
    ]


class Upload(Document):
    """The result of `upload`."""

    source: Annotated[str, "the folder"]
    published: list[Published]


class ReleaseLayout(TypedDict):
    """One layout of a release."""

    layout: str
    repo: Annotated[str, "OWNER/NAME"]
    out: Annotated[str, "its folder"]
    conversion: Literal["convert", "there already", "as it is"]
    files: Annotated[list[File], "the published files"]
    bytes: Annotated[int, "their sizes together"]
    published: list[Published]


class Release(Document):
    """The result of `release`, or with `--dry-run` what it would do."""

    source: str
    name: Annotated[str, "ORG/NAME"]
    hubs: Annotated[list[str], "the names of the hubs, as for `--hub`"]
    done: Annotated[bool, "false for a dry run"]
    layouts: list[ReleaseLayout]


class SweepCheckpoint(TypedDict):
    """One checkpoint of a sweep."""

    source: str
    out: str
    state: Literal["converted", "there already", "not complete", "refused", "to convert"]
    said: Annotated[str, "the reason, if it was not converted"]
    copied: Annotated[int, "how many files were copied from the output of an earlier step"]
    exit_code: Annotated[int, "the exit code of this conversion"]


class Sweep(Document):
    """The result of `sweep`, or with `--dry-run` what it would do."""

    source: Annotated[str, "the pattern"]
    done: Annotated[bool, "false for a dry run"]
    checkpoints: list[SweepCheckpoint]


Family = TypedDict(
    "Family",
    {
        "part": Annotated[str, "the part of a LLaVA that it can be"],
        "model_types": Annotated[list[str], "its `model_type` in configs"],
        "as": Annotated[list[str], "the families that its models can be written as (`--as`)"],
        "called": Annotated[Mapping[str, str], "by layout, its name there"],
    },
)


class Quantized(TypedDict):
    """A quantisation format of another program."""

    name: str
    becomes_floats: Annotated[bool, "true if `--dequantize` can turn it into floats"]


class Layouts(Document):
    """The layouts, families and names that this version knows."""

    sources: Annotated[Mapping[str, list[str]], "by layout, the dialects of its tensor names"]
    targets: list[str]
    families: Mapping[str, Family]
    outtypes: Annotated[list[str], "GGUF types, as for `--outtype`"]
    quantizations: Annotated[list[Quantized], "the quantisation formats of other programs that are recognised"]
    templates: Annotated[list[str], "prompt templates, as for `--prompt-template`"]
    recipes: Annotated[list[str], "recipes of `train`"]
    ops: list[str]


class Counts(TypedDict):
    """The number of parameters of a part."""

    all: int
    trained: int


class Stage(TypedDict):
    """A stage of a training."""

    name: str
    sets: NotRequired[Annotated[Mapping[str, int], "by data set, the number of conversations for training"]]
    pictures: NotRequired[int]
    iterations: NotRequired[Annotated[int | None, "null if the data are incomplete"]]
    steps: NotRequired[int | None]
    parameters: NotRequired[
        Annotated[Mapping[str, Counts] | None, "by part; null if a base model is not available here"]
    ]
    weights_bytes: NotRequired[int | None]
    optimizer_bytes: NotRequired[int | None]
    start: NotRequired[Annotated[str, "the weights from which the stage starts"]]
    missing: NotRequired[Annotated[list[str], "what the stage needs before it can be trained"]]


class Known(TypedDict):
    """A recipe that comes with the package."""

    name: str
    stage: str
    trains: str
    model: str
    data: str
    memory: str


class Train(Document):
    """The result of `train`, or with `--dry-run` what it would do."""

    done: Annotated[bool, "false for a dry run"]
    out: Annotated[str | None, "the last checkpoint; null for a dry run"]
    stages: Annotated[list[Stage], "the stages; a dry run adds the other keys to the name"]
    recipes: NotRequired[Annotated[list[Known], "with `--list`: the recipes of the package"]]


class Set(TypedDict):
    """A data set of a recipe."""

    name: str
    file: str
    rows: int
    kept: Annotated[int, "the number of rows for training"]
    pictures: Annotated[int, "how many of these rows have a picture"]
    left_out: Annotated[
        Mapping[str, int], "by reason, the number of rows and parts of rows that are not used for training"
    ]
    missing: Annotated[Mapping[str, int], "by folder, the number of missing pictures"]
    broken: Annotated[Mapping[str, str], "with `--open`: pictures that cannot be read, with the reason"]
    problem: Annotated[str, "why training refuses the data set; empty if it does not"]
    absent: Annotated[list[str], "some of the missing pictures"]


class DataCheck(Document):
    """The result of `data check`."""

    sets: list[Set]


class DataFixOcrvqa(Document):
    """The result of `data fix-ocrvqa`."""

    copied: int
    there: Annotated[int, "the number of pictures that had a .jpg already"]


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
