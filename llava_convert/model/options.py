"""What the user wants of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

from llava_convert.core.flags import AUTO, OUTPUT, Flag, Flagged
from llava_convert.core.values import dataclass

ALL = "all"
DROP = "drop"  # what becomes of tensors that no table has
QUICK, FULL, OFF = "quick", "full", "off"  # how much of an output is verified

# What people call the dtypes: torch's names, those of its shorthands, and those of trainers' flags.
DTYPES = {
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "f32", "float", "full"),
}
OTHER_DTYPES = {other: name for name, others in DTYPES.items() for other in (*others, f"torch.{name}")}
# Those of `offers` are what TAB offers; `layouts/gguf/mixes.py` knows them all.
_OUTTYPES = (
    "auto",
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q4_k_m",
    "q4_0",
    "iq4_xs",
    "iq4_nl",
    "q3_k_m",
    "q2_k",
)


def part_named(word: object) -> str | None:
    """The part, or all, that a word means: of `--part`, or of an older record. None for any other."""
    from llava_convert.model.checkpoint import PART_WORDS  # late: it needs NumPy, and `--help` reads this module

    words = {ALL: ALL} | {name: part for part, name in PART_WORDS.items()} | {part: part for part in PART_WORDS}
    return words.get(word) if isinstance(word, str) else None


def type_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """`f16,q4_k_m`, or a list of such; `auto` among them says nothing."""
    names = value.split(",") if isinstance(value, str) else value or ()
    return tuple(name.strip() for name in names if name.strip().lower() not in ("", AUTO))


@dataclass(frozen=True, kw_only=True)
class PartOption(Flagged):
    """The part of the model that is meant."""

    part: Annotated[
        str,
        Flag(
            "Convert only one part.",
            OUTPUT,
            choices=(ALL, "llm", "projector", "visual-encoder"),
            others={"language_model": "llm", "vision_tower": "visual-encoder", "visual_encoder": "visual-encoder"},
        ),
    ] = ALL


@dataclass(frozen=True, kw_only=True)
class TypesOption(Flagged):
    """The types of a language model in GGUF."""

    outtype: Annotated[
        str | Sequence[str] | None,
        Flag(
            "Types of the language model, one file for each. Default (auto): bf16 for a bf16 source, else f16.",
            OUTPUT,
            metavar="f16|q8_0|q4_k_m|…[,…]",
            offers=_OUTTYPES,
        ),
    ] = None

    @property
    def outtypes(self) -> tuple[str, ...]:
        return type_names(self.outtype)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(TypesOption):
    """The options that shape an output; LayoutInfo.writes says in which layouts. None means the layout's default."""

    max_shard_size: Annotated[
        str | int | None,
        Flag(
            "Default: the source's shards; for a .pth 2GB (5GB for hf).",
            OUTPUT,
            metavar="keep|5GB|…",
            offers=("keep", "2GB", "5GB", "10GB"),
        ),
    ] = None
    prompt_template: Annotated[
        str | None,
        Flag("Chat template, by its name in xtuner. Default: the one used in training.", OUTPUT, metavar="NAME"),
    ] = None
    chat_template: Annotated[
        str | Path | None,
        Flag("Jinja file that replaces the chat template.", OUTPUT, metavar="FILE"),
    ] = None
    stop: Annotated[
        str | Sequence[str] | None,
        Flag("Stop tokens, or their ids. They replace the source's.", OUTPUT, metavar="TOKEN|ID[,…]"),
    ] = None
    dtype: Annotated[
        object,
        Flag(
            "Default (auto): the 16-bit dtype in which training loaded the language model; else the "
            "source's, or float16.",
            OUTPUT,
            choices=(AUTO, *DTYPES),
            others=OTHER_DTYPES,
        ),
    ] = None
    image_processor: Annotated[
        str | None,
        Flag(
            "clip (the default): crop pictures to squares, loads everywhere. llava: pad them, as in training.",
            OUTPUT,
            choices=("clip", "llava"),
        ),
    ] = None
    mmproj_outtype: Annotated[
        str | Sequence[str] | None,
        Flag(
            "Types of the mmproj (tower and projector). Default: f16.",
            OUTPUT,
            metavar="f16|q8_0|…[,…]",
            offers=("f32", "f16", "bf16", "q8_0"),
        ),
    ] = None
    mmproj_for: Annotated[
        str | None,
        Flag(
            "stock: an mmproj only for current llama.cpp, which puts the class token last.",
            OUTPUT,
            choices=("stock",),
        ),
    ] = None
    pre: Annotated[
        str | None,
        Flag(
            "llama.cpp's name of the pre-tokenizer. Default: recognised by how it splits text.", OUTPUT, metavar="NAME"
        ),
    ] = None
    as_family: Annotated[
        str | None,
        Flag(
            "Write the language model as another family that computes the same: Phi-3 as llama, or back.",
            OUTPUT,
            metavar="FAMILY",
            spelling="--as",
        ),
    ] = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Where answers end, as it was asked for: a token's text or its id each."""
        words = self.stop.split(",") if isinstance(self.stop, str) else self.stop or ()
        return tuple(word for one in words if (word := str(one).strip()))

    @property
    def mmproj_outtypes(self) -> tuple[str, ...]:
        return type_names(self.mmproj_outtype)


@dataclass(frozen=True, kw_only=True)
class TargetOptions(OutputOptions):
    """What a layout is told of its output: the user's options; the part, or all; `name`, by which files are called.

    `chat_template` is the template itself.
    """

    dtype: str | None = None
    max_shard_size: str | None = None
    chat_template: str | None = None
    part: str = ALL
    name: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
