"""A tokenizer as GGUF's `tokenizer.*` metadata, such that llama.cpp encodes as transformers does.

Two kinds: byte-level BPE ("gpt2": Llama-3, Qwen2, SmolLM2), told by its merges and the name of its pre-tokenizer, and
SentencePiece ("llama": Llama-2, Vicuna, Mistral, Phi-3), told by a score for each piece. Facts: llama-vocab.cpp, and
what convert_hf_to_gguf writes for the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.assets.tokenizer.json_edit import has_type
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.values import dataclass
from llava_convert.layouts.gguf.pre_tokenizers import pre_tokenizer_of
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sentencepiece import is_tiktoken, read_model

SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
SPACE_FIRST = "llava.tokenizer_space_first"  # for the way back: no runtime reads it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
# Tokens at which llama.cpp ends a generation by their text alone (llama-vocab.cpp, special_eog_ids).
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# does_token_look_special of convert_hf_to_gguf.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>", re.DOTALL)


@dataclass
class _Tokens:
    """Text, type and score of every id; ids without a token are `[PAD<id>]`, unused."""

    texts: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def empty(cls, rows: int) -> _Tokens:
        return cls([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [_UNUSED_SCORE] * rows)

    @classmethod
    def of(cls, vocabulary: Mapping[str, int], rows: int) -> _Tokens:
        """As `put` for each token, which of 128,000 takes long."""
        texts: list[str | None] = [None] * rows
        for text, i in vocabulary.items():
            texts[i] = text
        types = [NORMAL] * rows
        for i in [i for i, text in enumerate(texts) if text is None]:
            texts[i], types[i] = f"[PAD{i}]", UNUSED
        return cls(cast(list[str], texts), types, [0.0] * rows)

    def put(self, i: int, text: str, kind: int, score: float = 0.0) -> None:
        self.texts[i], self.types[i], self.scores[i] = text, kind, score


def tokenizer_metadata(
    tokenizer: Tokenizer,
    rows: int,
    *,
    pre: str | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Typed]:
    """Every `tokenizer.*` key for an embedding of `rows` rows; `stop_ids` are the ids at which the model stops.

    The model's `config` tells the ids of special tokens that the tokenizer does not name (Qwen2's has no BOS).

    Raises InputError where there are more tokens than rows or a part of the tokenizer is missing, UnsupportedError
    (exit 4) for kinds that llama.cpp does not have and a pre-tokenizer that is not known, UsageError for a wrong `pre`.
    """
    if tokenizer.size > rows:
        raise InputError(
            f"{tokenizer.where}: the tokenizer has {tokenizer.size} tokens, but the embedding only {rows} rows",
            hint="--vocab tokens adds a row for each token without one (the mean of the other rows)",
        )
    if tokenizer.byte_level or not (tokenizer.fast or _has_pieces(tokenizer)):
        tokens = _Tokens.of(tokenizer.vocabulary, rows)
        found = _byte_level(tokenizer, tokens, pre)
    else:
        tokens = _Tokens.empty(rows)
        found = _pieces(tokenizer, tokens)
    found |= _special_ids(tokenizer, tokens, stop_ids, config or {})
    found["tokenizer.ggml.add_bos_token"] = Typed("bool", tokenizer.adds_bos)
    found["tokenizer.ggml.add_eos_token"] = Typed("bool", tokenizer.config.get("add_eos_token") is True)
    if _separates(tokenizer.fast.get("post_processor"), tokenizer.eos):
        found["tokenizer.ggml.add_sep_token"] = Typed("bool", False)
    if chat_template:
        found["tokenizer.chat_template"] = Typed("str", chat_template)
    return found


def _byte_level(tokenizer: Tokenizer, tokens: _Tokens, pre: str | None) -> dict[str, Typed]:
    _add_added(tokenizer, tokens)
    return {
        "tokenizer.ggml.model": Typed("str", "gpt2"),
        "tokenizer.ggml.pre": Typed("str", pre_tokenizer_of(tokenizer, pre)),
        "tokenizer.ggml.tokens": Typed("[str]", tokens.texts),
        "tokenizer.ggml.token_type": Typed("[i32]", tokens.types),
        "tokenizer.ggml.merges": Typed("[str]", _merges(tokenizer)),
    }


def _merges(tokenizer: Tokenizer) -> list[str]:
    """Pairs as "a b", in their order. A space within a token is written as byte-level text writes it."""
    merges = (tokenizer.fast.get("model") or {}).get("merges")
    if merges is None and "merges.txt" in tokenizer.files:
        lines = tokenizer.read("merges.txt").decode("utf-8", "replace").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if not isinstance(merges, list) or not merges:
        raise InputError(f"{tokenizer.where}: the tokenizer has no merges", hint="get tokenizer.json again")
    kinds = set(map(type, merges))
    if kinds == {list}:  # as in every file of today; no other space in all of them than those put between the parts
        pairs = list(map(" ".join, merges))
        if "".join(pairs).count(" ") == sum(map(len, merges)) - len(merges):
            return pairs
    return merges if kinds == {str} else [m if isinstance(m, str) else _pair(m) for m in merges]


def _pair(parts: Sequence[str]) -> str:
    pair = " ".join(parts)
    return pair if pair.count(" ") == len(parts) - 1 else " ".join(part.replace(" ", "Ġ") for part in parts)


def _has_pieces(tokenizer: Tokenizer) -> bool:
    return "tokenizer.model" in tokenizer.files and not is_tiktoken(tokenizer.read("tokenizer.model"))


def _pieces(tokenizer: Tokenizer, tokens: _Tokens) -> dict[str, Typed]:
    prefix = True
    if _has_pieces(tokenizer):
        pieces, prefix = read_model(tokenizer.read("tokenizer.model"), tokenizer.where / "tokenizer.model")
        for i, piece in enumerate(pieces):
            tokens.put(i, piece.text, piece.type, piece.score)
    else:
        _pieces_of_merges(tokenizer, tokens)
    _add_added(tokenizer, tokens)
    found = {
        "tokenizer.ggml.model": Typed("str", "llama"),
        "tokenizer.ggml.pre": Typed("str", "default"),
        "tokenizer.ggml.tokens": Typed("[str]", tokens.texts),
        "tokenizer.ggml.scores": Typed("[f32]", tokens.scores),
        "tokenizer.ggml.token_type": Typed("[i32]", tokens.types),
    }
    if tokenizer.fast:
        prefix = _adds_space(tokenizer.fast)
    if not prefix:
        found[SPACE_PREFIX] = Typed("bool", False)
    return found


def _pieces_of_merges(tokenizer: Tokenizer, tokens: _Tokens) -> None:
    """SentencePiece's scores from tokenizer.json's merges: the earlier a piece is merged, the higher its score."""
    model: dict[str, Any] = tokenizer.fast.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise UnsupportedError(
            f"{tokenizer.where}: a tokenizer of type {model.get('type')} cannot be written as GGUF",
            hint="SentencePiece BPE and byte-level BPE can; put the model's tokenizer.model beside it if it has one",
        )
    ranks: dict[str, int] = {}
    for merge in model.get("merges") or ():
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), len(ranks))
    unknown = model.get("unk_token")
    for text, i in model["vocab"].items():
        kind = BYTE if _BYTE_PIECE.fullmatch(text) else UNKNOWN if text == unknown else NORMAL
        tokens.put(i, text, kind, 0.0 if kind != NORMAL else -float(ranks.get(text, len(ranks))))


def _adds_space(fast: dict[str, Any]) -> bool:
    """Whether a text gets a space in front, as tokenizer.json says."""
    if has_type(fast.get("normalizer"), "Prepend"):
        return True
    found = _find(fast.get("pre_tokenizer"), "Metaspace")
    return (
        found is not None and found.get("prepend_scheme", "always") != "never" and found.get("add_prefix_space", True)
    )


def _separates(processor: Any, eos: str | None) -> bool:
    """Whether pairs of texts have a token between them which is no separator: the reference then says so."""
    pair = (_find(processor, "TemplateProcessing") or {}).get("pair") or []
    names = [entry.get("SpecialToken", {}).get("id") for entry in pair if isinstance(entry, dict)]
    return len(names) > 3 and names[2] is not None and names[2] != eos


def _find(node: Any, kind: str) -> dict[str, Any] | None:
    if isinstance(node, dict):
        if node.get("type") == kind:
            return node
        node = list(node.values())
    if isinstance(node, list):
        return next((found for value in node if (found := _find(value, kind)) is not None), None)
    return None


def _add_added(tokenizer: Tokenizer, tokens: _Tokens) -> None:
    """Added tokens, over what the model's vocabulary says of their ids.

    The unknown one becomes a control token where the reference converter has it so: tokenizer_config.json lists it, or
    tokenizer.model, whose own type counts else, is not there. The runtime makes no difference between the two.
    """
    listed = tokenizer.config.get("added_tokens_decoder") or {}
    typed = "tokenizer.model" in tokenizer.files
    for i, entry in tokenizer.added.items():
        text = str(entry["content"])
        if tokens.types[i] == UNKNOWN and tokens.texts[i] == text and typed and str(i) not in listed:
            continue
        special = bool(entry.get("special")) or _LOOKS_SPECIAL.fullmatch(text) is not None
        if tokens.types[i] == BYTE and tokens.texts[i] == text:
            continue
        # llama.cpp matches user-defined tokens in the raw text, where a space is a space.
        tokens.put(i, text if special else text.replace("▁", " "), CONTROL if special else USER_DEFINED, _ADDED_SCORE)


def _special_ids(
    tokenizer: Tokenizer, tokens: _Tokens, stop_ids: Sequence[int], config: Mapping[str, Any]
) -> dict[str, Typed]:
    """The ids of special tokens, and a place for each stop id that the runtime would not know by its text."""
    named = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unk, "padding": tokenizer.pad}
    ids = {key: i for key, text in named.items() if text is not None and (i := tokenizer.id_of(text)) is not None}
    if stop_ids and ids.get("eos") not in stop_ids:
        ids["eos"] = stop_ids[0]
    for key in ("bos", "eos"):
        stated = config.get(f"{key}_token_id")
        if type(stated) is int and 0 <= stated < len(tokens.texts):
            ids.setdefault(key, stated)
    strange = [i for i in stop_ids if i != ids.get("eos") and i < len(tokens.texts) and tokens.texts[i] not in ENDS]
    if len(strange) > 2:
        texts = ", ".join(tokens.texts[i] for i in strange)
        raise UnsupportedError(
            f"too many stop tokens besides the EOS: {texts}; GGUF has room for two, an EOT and an EOM token"
        )
    ids |= dict(zip(("eot", "eom"), strange, strict=False))
    order = ("bos", "eos", "eot", "eom", "unknown", "padding")
    return {f"tokenizer.ggml.{key}_token_id": Typed("u32", ids[key]) for key in order if key in ids}
