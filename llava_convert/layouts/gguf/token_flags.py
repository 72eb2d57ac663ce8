"""What a GGUF cannot say of a tokenizer: white space that a token takes along, and where a text begins.

llama.cpp knows the former by the model's name alone: of one that is called phi-3 or phi3 every special token takes the
white space behind it along, but for three (llama-vocab.cpp, "Handle per token attributes"), as Phi-3's own files have
it. And it puts SentencePiece's space in front of a text behind every special token.
"""

from __future__ import annotations

import re
from typing import Any

from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN, PAD_TOKEN

_NAMED = re.compile(r"phi(-?)3", re.IGNORECASE)
# The runtime looks these up without asking whether they are there, and ends where one is not.
_LOOKED_UP = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def runtime_name(name: str, tokenizer: Tokenizer) -> str:
    """`name` for `general.name`, such that the runtime handles the tokenizer's tokens as transformers does."""
    stripping = _as_phi3(tokenizer)
    if _NAMED.search(name):
        return name if stripping else _NAMED.sub("phi 3", name)
    return f"{name}-phi-3" if stripping else name


def _as_phi3(tokenizer: Tokenizer) -> bool:
    return bool(_stripping(tokenizer)) and all(text in tokenizer.vocabulary for text in _LOOKED_UP)


def _stripping(tokenizer: Tokenizer) -> list[str]:
    return [str(entry["content"]) for entry in tokenizer.added.values() if entry.get("rstrip")]


def takes_space(name: Any, token: str) -> bool:
    """Whether the runtime has an added token of a model of this `general.name` take the white space behind it along.

    LLaVA's own tokens stand in no prompt of the runtime's, and keep theirs in transformers.
    """
    named = isinstance(name, str) and _NAMED.search(name) is not None
    return named and token not in ("<unk>", "<s>", "<|endoftext|>", IMAGE_TOKEN, PAD_TOKEN)


def unsaid(tokenizer: Tokenizer) -> list[str]:
    """Warnings of texts that the runtime encodes otherwise."""
    said: list[str] = []
    lstrip = [str(entry["content"]) for entry in tokenizer.added.values() if entry.get("lstrip")]
    rstrip = [] if _as_phi3(tokenizer) else _stripping(tokenizer)
    if lstrip or rstrip:
        said.append(
            f"special tokens take white space around them along ({(lstrip or rstrip)[0]} is one of "
            f"{len({*lstrip, *rstrip})}), which a GGUF cannot say: leave none there in prompts"
        )
    if space_first(tokenizer):
        said.append(
            "llama.cpp puts a space in front of text behind a special token, and of text that begins with one; this "
            "tokenizer puts one at the beginning of the whole text alone, where there is none"
        )
    return said


def space_first(tokenizer: Tokenizer) -> bool:
    """Whether SentencePiece's space stands at the beginning of a text alone, as in transformers with `legacy` false."""
    if tokenizer.byte_level:
        return False
    if tokenizer.fast:
        return _scheme(tokenizer.fast.get("pre_tokenizer")) == "first"
    return tokenizer.is_llama and tokenizer.config.get("legacy") is False


def _scheme(component: Any) -> str | None:
    if not isinstance(component, dict):
        return None
    inner = component.get("pretokenizers") or []
    return component.get("prepend_scheme") or next((found for one in inner if (found := _scheme(one))), None)
