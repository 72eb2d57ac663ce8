"""How to use an output: one section for each program that reads it.

The layout's entry (`layouts/info.py`) names the texts of `texts/` that a card has. In a text `<<word>>` stands for what
`Words` has under that name. To add a program, add a text and name it there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.words import Words
from llava_convert.model.facts import CLASS_TOKEN

_TEXTS = Path(__file__).parent / "texts"
_WORD = re.compile(r"<<(\w+)>>")
_GAP = re.compile(r"\n{3,}")


def _has_class(facts: Facts) -> bool:
    """Whether the original code has classes for the parts: Llama and Mistral (llava/model/__init__.py), and CLIP."""
    kinds = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
    return facts.llava_class in kinds and facts.model.facts.get(CLASS_TOKEN) is not False


def _adapter(facts: Facts) -> bool:
    return facts.adapter


def _no(condition: Callable[[Facts], bool]) -> Callable[[Facts], bool]:
    return lambda facts: not condition(facts)


# Texts that do not fit every output of a layout that names them.
CONDITIONS: Mapping[str, Callable[[Facts], bool]] = {
    "sglang": lambda facts: (
        facts.model.checkpoint.settings.select_strategy == "default"
        and facts.llava_class == "LlavaForConditionalGeneration"
    ),
    "llava": _has_class,
    "lmdeploy_official": _has_class,
    "llava_forks": _no(_has_class),
    "language_model": _no(_adapter),
    "language_model_vllm": _no(_adapter),
    "llm_adapter": _adapter,
    "vision_tower": _no(_adapter),
    "tower_adapter": _adapter,
}


def quickstarts(facts: Facts) -> list[str]:
    """The sections of an output, and what they share. Raises FileNotFoundError for a text that does not exist."""
    words = Words(facts)
    found = [filled(_read(text), words) for text in facts.card.quickstarts if _fits(text, facts)]
    return [*filter(None, (words.files, words.download)), *found, *filter(None, (words.prompt_section,))]


def _fits(text: str, facts: Facts) -> bool:
    condition = CONDITIONS.get(text)
    return condition is None or condition(facts)


def filled(text: str, words: Words) -> str:
    """A text with its words put in; an empty one leaves no gap. Raises AttributeError for one that is unknown."""
    return _GAP.sub("\n\n", _WORD.sub(lambda found: str(getattr(words, found[1])), text)).strip()


@cache
def _read(text: str) -> str:
    return (_TEXTS / f"{text}.md").read_text(encoding="utf-8")
