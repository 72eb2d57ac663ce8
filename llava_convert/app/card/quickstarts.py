"""How to use an output: one section for each runtime that reads it.

A section is a row of SECTIONS: what it is called, the text in `texts/`, and whether an output is for it. In a text
`<<word>>` stands for what `Words` has under that name. To add a runtime, add a row and a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.words import Words
from llava_convert.model.checkpoint import LLM, PROJECTOR, VISION

_TEXTS = Path(__file__).parent / "texts"
_WORD = re.compile(r"<<(\w+)>>")
_GAP = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Section:
    """One runtime: `text` is a file of `texts/`, `fits` says whether it reads the output."""

    title: str
    text: str
    fits: Callable[[Facts], bool]


def _whole(layout: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.layout == layout and facts.whole


def _alone(part: str, layout: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.layout == layout and facts.alone == part


def _folder_of(part: str) -> Callable[[Facts], bool]:
    """A language model or a tower alone as a folder that transformers reads, whichever layout was asked for."""
    return lambda facts: facts.alone == part and facts.layout != "gguf" and not facts.adapter


def _adapter_of(part: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.alone == part and facts.adapter


def _official(*, known: bool) -> Callable[[Facts], bool]:
    """Whether the original code has a class for the language model: for Llama and Mistral (llava/model/__init__.py)."""
    return lambda facts: _whole("official")(facts) and (facts.llava_class in _LLAVA) == known


_LLAVA = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
SECTIONS = (
    Section("transformers", "transformers.md", _whole("hf")),
    Section("vLLM", "vllm.md", _whole("hf")),
    Section("LMDeploy", "lmdeploy.md", _whole("hf")),
    Section(
        "SGLang", "sglang.md", lambda f: _whole("hf")(f) and f.model.checkpoint.settings.select_strategy == "default"
    ),
    Section("LLaVA", "llava.md", _official(known=True)),
    Section("LLaVA", "llava_forks.md", _official(known=False)),
    Section("LMDeploy", "lmdeploy_official.md", _official(known=True)),
    Section("SGLang", "sglang_official.md", _whole("official")),
    Section("llama.cpp", "llama_cpp.md", _whole("gguf")),
    Section("Ollama", "ollama.md", _whole("gguf")),
    Section("xtuner", "xtuner.md", _whole("xtuner")),
    Section("transformers", "language_model.md", _folder_of(LLM)),
    Section("vLLM", "language_model_vllm.md", _folder_of(LLM)),
    Section("peft", "llm_adapter.md", _adapter_of(LLM)),
    Section("transformers", "vision_tower.md", _folder_of(VISION)),
    Section("peft", "tower_adapter.md", _adapter_of(VISION)),
    Section("safetensors", "projector.md", _alone(PROJECTOR, "hf")),
    Section("LLaVA", "projector_llava.md", _alone(PROJECTOR, "official")),
    Section("llama.cpp", "llama_cpp_text.md", _alone(LLM, "gguf")),
    Section("Ollama", "ollama_text.md", _alone(LLM, "gguf")),
    Section("llama.cpp", "llama_cpp_mmproj.md", _alone(VISION, "gguf")),
)


def quickstarts(facts: Facts) -> list[str]:
    """The sections of an output, in the table's order, with what all of them share in front."""
    words = Words(facts)
    found = [f"## {s.title}\n\n{filled(s.text, words)}" for s in SECTIONS if s.fits(facts)]
    return [*filter(None, (words.files, words.download)), *found, *filter(None, (words.prompt_section,))]


def filled(text: str, words: Words) -> str:
    """A text with its words put in; an empty one leaves no gap. Raises AttributeError for one that is unknown."""
    return _GAP.sub("\n\n", _WORD.sub(lambda found: str(getattr(words, found[1])), _read(text))).strip()


@cache
def _read(text: str) -> str:
    return (_TEXTS / text).read_text(encoding="utf-8")
