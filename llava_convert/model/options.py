"""What the user wants of an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llava_convert.model.checkpoint import PART_WORDS

ALL = "all"


def part_named(word: object) -> str | None:
    """The part, or all, that a word means: of `--part`, or of an older record. None for any other."""
    words = {ALL: ALL} | {name: part for part, name in PART_WORDS.items()} | {part: part for part in PART_WORDS}
    return words.get(word) if isinstance(word, str) else None


@dataclass(frozen=True)
class TargetOptions:
    """What the user wants of the output. None, or nothing, means the default of the layout.

    The types are GGUF's, `pre` is its name of a pre-tokenizer; `name` is what files are called by. `as_family` is the
    family that the language model is written as.
    """

    dtype: str | None = None
    max_shard_size: str | None = None
    part: str = ALL
    prompt_template: str | None = None
    image_processor: str | None = None
    outtypes: tuple[str, ...] = ()
    mmproj_outtypes: tuple[str, ...] = ()
    pre: str | None = None
    as_family: str | None = None
    name: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
