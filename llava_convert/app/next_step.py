"""What to do with an output first: a line of Python, or a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.quickstarts import filled
from llava_convert.app.card.words import Words
from llava_convert.app.options import SourceOptions
from llava_convert.model.checkpoint import LLM, PART_WORDS, VISION


def next_step(facts: Facts, source: str, options: SourceOptions, *, here: bool) -> str:
    """How to try an output; to compare it, where nothing here can load it. `facts` name it by its path, or its URL."""
    text = facts.card.next
    if text is not None and here and not facts.adapter:
        return filled(text, Words(facts))
    return shlex.join(["llava-convert", "verify", source, facts.name, *_flags(options)])


def _flags(options: SourceOptions) -> Iterator[str]:
    """The options without which the source could not be read again as it was."""
    bases = options.bases
    given = {
        "--config": options.config,
        "--config-from": options.config_from,
        "--mmproj": options.mmproj,
        "--pretrained-pth": options.pretrained_pth,
        f"--{PART_WORDS[LLM]}": bases.llm,
        f"--{PART_WORDS[VISION]}": bases.visual_encoder,
        "--lora-alpha": _alpha(bases.lora_alpha),
    }
    for flag, value in given.items():
        if value is not None:
            yield from (flag, str(value))


def _alpha(given: Mapping[str, float]) -> str | None:
    return ",".join(f"{part}={value}" for part, value in given.items()) or None
