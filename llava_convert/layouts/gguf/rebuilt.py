"""The tokenizer's files of a transformers folder, made again of a GGUF's `tokenizer.*` metadata.

What is made encodes and decodes as llama.cpp does with that metadata. All is in the form that transformers 4.37 to 5.x
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.later import numpy as np
from llava_convert.core.text import printable, to_json
from llava_convert.core.values import dataclass
from llava_convert.layouts.gguf.pre_tokenizers import pre_tokenizers
from llava_convert.layouts.gguf.token_flags import takes_space
from llava_convert.layouts.gguf.vocabulary import (
    BYTE,
    CONTROL,
    ENDS,
    NORMAL,
    SPACE_FIRST,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from llava_convert.storage.gguf.file import Typed
from llava_convert.storage.sentencepiece import Piece, write_model

MOST_TOKENS = 4_000_000
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
# As transformers' LlamaConverter makes them with `legacy` false.
_AT_THE_BEGINNING = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


def tokenizer_files(metadata: Mapping[str, Typed]) -> dict[str, bytes]:
    """tokenizer.json and its kin, generation_config.json among them, by name; {} where there is no tokenizer.

    Raises InputError where parts are missing or do not fit together, UnsupportedError (exit 4) for a kind of tokenizer
    or a pre-tokenizer that is not known.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return {}
    found = _Vocabulary(metadata)
    kind = found.text("tokenizer.ggml.model")
    if kind == "gpt2":
        content, files = _byte_level(found), {}
    elif kind == "llama":
        content, files = _sentencepiece(found), {"tokenizer.model": _model_file(found)}
    else:
        raise UnsupportedError(f"the GGUF's tokenizer is of the kind {kind!r}; known: gpt2, llama")
    files["tokenizer.json"] = to_json(content)
    files["tokenizer_config.json"] = to_json(_config(found, content, kind))
    files["special_tokens_map.json"] = to_json(found.special)
    files["generation_config.json"] = to_json(_generation(found))
    if kind == "llama" and (later := {t: i for i, t in found.added.items() if i >= len(found.pieces)}):
        files["added_tokens.json"] = to_json(later)
    return files


@dataclass(frozen=True)
class _Vocabulary:
    """The metadata, looked through: as many types and scores as tokens, ids that are there, no token twice."""

    metadata: Mapping[str, Typed]

    def get(self, key: str, default: Any = None) -> Any:
        typed = self.metadata.get(key)
        return default if typed is None else typed.value

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise InputError(f"the GGUF has no {key}", hint="its tokenizer is incomplete; convert the model again")
        return value

    def list_of(self, key: str, kind: type | tuple[type, ...], length: int | None) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
            raise InputError(f"the GGUF has no {key}, or it is not a list of the right kind")
        if length is not None and len(value) != length:
            raise InputError(f"the GGUF's {key} has {len(value)} entries for {length} tokens")
        return list(value)

    @cached_property
    def tokens(self) -> list[str]:
        """Every token up to the last one that is used."""
        found = self.list_of("tokenizer.ggml.tokens", str, None)
        if not 0 < len(found) <= MOST_TOKENS:
            raise InputError(f"the GGUF's tokenizer has {len(found):,} tokens")
        used = max((i for i, kind in enumerate(self.every_type(len(found))) if kind != UNUSED), default=-1)
        found = found[: used + 1]
        if len(set(found)) != len(found):
            raise InputError("the GGUF's tokenizer has a token twice")
        return found

    def every_type(self, count: int) -> list[int]:
        if "tokenizer.ggml.token_type" not in self.metadata:
            return [NORMAL] * count
        return self.list_of("tokenizer.ggml.token_type", int, count)

    @cached_property
    def types(self) -> list[int]:
        """SentencePiece's unknown token is one, though the reference converter calls it a control token."""
        found = self.every_type(len(self.get("tokenizer.ggml.tokens")))[: len(self.tokens)]
        if self.get("tokenizer.ggml.model") == "llama" and UNKNOWN not in found:
            i = self.id("unknown")
            place = 0 if i is None else i  # llama-vocab.cpp: 0 where a file does not say
            if found[place] == CONTROL:
                found[place] = UNKNOWN
        return found

    @cached_property
    def scores(self) -> list[float]:
        count = len(self.get("tokenizer.ggml.tokens"))
        return [float(s) for s in self.list_of("tokenizer.ggml.scores", (int, float), count)][: len(self.tokens)]

    @cached_property
    def added(self) -> dict[int, str]:
        """Tokens that are matched whole: special ones and user-defined ones; of SentencePiece the unknown one too."""
        wanted = {CONTROL, USER_DEFINED} | (set() if self.get("tokenizer.ggml.model") == "gpt2" else {UNKNOWN})
        return {i: token for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind in wanted}

    @cached_property
    def pieces(self) -> list[Piece]:
        """SentencePiece's own: up to the last one that is no added token."""
        own = [i for i, kind in enumerate(self.types) if kind in (NORMAL, BYTE, UNKNOWN)]
        size = max(own, default=-1) + 1
        return [Piece(*one) for one in zip(self.tokens[:size], self.scores, self.types, strict=False)]

    def id(self, name: str) -> int | None:
        value = self.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise InputError(f"the GGUF's {name} token has the id {value}, and there are {len(self.tokens)} tokens")
        return value

    @cached_property
    def special(self) -> dict[str, str]:
        """`bos_token` and its kin, as far as they are told."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        found = {config: self.tokens[i] for name, config in names.items() if (i := self.id(name)) is not None}
        # Qwen2's tokenizer has no BOS: the id is its config's, that of the token which ends a text.
        if found.get("bos_token") in ENDS and self.get("tokenizer.ggml.add_bos_token") is False:
            del found["bos_token"]
        if self.get("tokenizer.ggml.model") == "llama":
            for i, kind in enumerate(self.types):
                if kind == UNKNOWN:
                    found.setdefault("unk_token", self.tokens[i])
        return found

    def adds(self, name: str) -> bool:
        default = name == "bos" and self.get("tokenizer.ggml.model") == "llama"
        return bool(self.get(f"tokenizer.ggml.add_{name}_token", default)) and f"{name}_token" in self.special


def _added_entries(found: _Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": takes_space(found.get("general.name"), token),
            "normalized": False,
            "special": found.types[i] != USER_DEFINED,
        }
        for i, token in found.added.items()
    ]


def _vocab(found: _Vocabulary) -> dict[str, int]:
    """The model's own vocabulary.

    Added tokens behind it get the next ids from the library, in order; where they are not just that (SmolLM2 has them
    first), they stand in the vocabulary too, with their ids.
    """
    own = [i for i in range(len(found.tokens)) if i not in found.added]
    if own == list(range(len(own))):
        return {found.tokens[i]: i for i in own}
    return {token: i for i, token in enumerate(found.tokens)}


def _byte_level(found: _Vocabulary) -> dict[str, Any]:
    name = found.get("tokenizer.ggml.pre")
    known = pre_tokenizers()
    if name not in known:
        raise UnsupportedError(
            f"the GGUF's pre-tokenizer is {name!r}; known: {', '.join(known)}",
            hint="take the tokenizer of the original model by --llm",
        )
    pre = known[name]
    vocab = _vocab(found)
    merges = found.list_of("tokenizer.ggml.merges", str, None)
    for merge in merges:  # the tokenizers library refuses others
        first, _, second = merge.partition(" ")
        if not (first in vocab and second in vocab and first + second in vocab):
            raise InputError(
                f"the GGUF's tokenizer.ggml.merges has {printable(merge[:80])}: one of the two tokens, or the merged "
                "token, is not in the vocabulary",
                hint="take the tokenizer of the original model by --llm",
            )
    return _json(
        found,
        normalizer={"type": pre.normalizer} if pre.normalizer else None,
        pre_tokenizer=pre.component(),
        post_processor=_post_processor(found, [_BYTES]),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={"ignore_merges": pre.ignore_merges, "vocab": vocab, "merges": merges},
    )


def _sentencepiece(found: _Vocabulary) -> dict[str, Any]:
    prefix = bool(found.get("tokenizer.ggml.add_space_prefix", True))
    first = prefix and bool(found.get(SPACE_FIRST, False))
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocab = {piece.text: i for i, piece in enumerate(found.pieces)}
    model = {"fuse_unk": True, "byte_fallback": True, "unk_token": found.special.get("unk_token"), "vocab": vocab}
    return _json(
        found,
        normalizer=None if first else {"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=_AT_THE_BEGINNING if first else None,
        post_processor=_post_processor(found, []),
        decoder={"type": "Sequence", "decoders": decoders},
        model={**model, "merges": _merges(found.pieces, vocab)},
    )


def _merges(pieces: list[Piece], vocab: Mapping[str, int]) -> list[str]:
    """Every way to make a piece of two others, the pieces with the highest scores first.

    As transformers makes them of a SentencePiece model (convert_slow_tokenizer.py, generate_merges).
    """
    found: list[tuple[float, int, int, str]] = []
    for piece in pieces:
        if piece.type not in (NORMAL, USER_DEFINED):
            continue
        splits = ((piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text)))
        known = sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
        found += [(piece.score, len(a), len(b), f"{a} {b}") for _, _, a, b in known]
    found.sort(key=lambda one: one[:3], reverse=True)
    return [merge for *_, merge in found]


def _post_processor(found: _Vocabulary, first: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What puts BOS and EOS around a text."""
    bos = [found.special["bos_token"]] if found.adds("bos") else []
    eos = [found.special["eos_token"]] if found.adds("eos") else []
    if not bos and not eos:
        return first[0] if first else None

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": token, "type_id": number}} for token in bos),
            {"Sequence": {"id": sequence, "type_id": number}},
            *({"SpecialToken": {"id": token, "type_id": number}} for token in eos),
        ]

    ids = {token: i for i, token in enumerate(found.tokens)}
    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in dict.fromkeys([*bos, *eos])},
    }
    return {"type": "Sequence", "processors": [*first, template]} if first else template


def _json(found: _Vocabulary, *, model: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    empty |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_entries(found)}
    return {**head, **parts, "model": {**empty, **model}}


def _model_file(found: _Vocabulary) -> bytes:
    ids = {name: i for name in ("unknown", "bos", "eos", "padding") if (i := found.id(name)) is not None}
    unknown = next((i for i, piece in enumerate(found.pieces) if piece.type == UNKNOWN), 0)
    prefix = bool(found.get("tokenizer.ggml.add_space_prefix", True))
    return write_model(found.pieces, unk=unknown, bos=ids.get("bos", -1), eos=ids.get("eos", -1), prefix=prefix)


def _config(found: _Vocabulary, content: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """tokenizer_config.json, with a class that every release loads as the files say."""
    decoder = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in content["added_tokens"]
    }
    prefix = bool(found.get("tokenizer.ggml.add_space_prefix", True))
    llama = kind == "llama" and prefix
    config: dict[str, Any] = {
        "add_bos_token": found.adds("bos"),
        "add_eos_token": found.adds("eos"),
        "added_tokens_decoder": decoder,
        **found.special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast",
    }
    if IMAGE_TOKEN in found.added.values():
        config.setdefault("unk_token", None)  # LLaVA's tokens are in: nothing is to be added before them
    if llama:
        config["legacy"] = not found.get(SPACE_FIRST, False)
    template = found.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        config["chat_template"] = template
    return dict(sorted(config.items()))


def _generation(found: _Vocabulary) -> dict[str, Any]:
    """Where generation begins and ends: at every token at which llama.cpp ends it."""
    ends = [i for name in ("eos", "eot", "eom") if (i := found.id(name)) is not None]
    ends += [i for i, token in enumerate(found.tokens) if token in ENDS and found.types[i] == CONTROL]
    config: dict[str, Any] = {"eos_token_id": sorted(set(ends))}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (i := found.id(name)) is not None:
            config[key] = i
    for key, setting in _SAMPLING.items():
        value = found.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            config[setting] = float(str(np.float32(value))) if isinstance(value, float) else value
    if "temperature" in config:
        config["do_sample"] = True
    return dict(sorted(config.items()))
