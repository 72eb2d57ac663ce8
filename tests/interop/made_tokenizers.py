"""Small tokenizers of each kind that GGUF holds, made here in the form in which models are published.

Byte-level ones learn their merges over whole lines, words and spaces together: a text that is cut at another place than
the pre-tokenizer says then gets other ids. SentencePiece ones have every merge that makes a piece, as the files that
transformers converts have. Nothing here goes through the package.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "the picture shows a cat on a red boat, and what is there: 12345 boats in a house by the sea",
    "The house isn't THE house; I'LL say we've seen it, don't you think? She'd say they're 'sure'.",
    "  two  three   four    five \t tab\t\ttabs\n\nlines\r\n\r\n  \n \n x\u00a0y\u3000z  ",
    "1 12 123 1234 12345 1234567 3.14159 v2.0 x86_64 6789 345 ٣٤٥ ½ ²",
    "naïve straße İstanbul é e\u0301 ﬁ 图片 描述一下 こんにちは 한국어 हिन्दी ไทย العربية עברית 🙂 🇫🇷",
    "def f(x_y): return [x]+{1} // a->b ... !!! ?! --- ___ #!/bin/sh $HOME 100% @a.b http://x.y/z?q=1\\",
    "user assistant system USER: ASSISTANT: [INST] [/INST] <| |> < > </ <s \u200b \ufeff \x7f \u2028 aaaa",
)
# As the models' own tokenizer.json files write them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SentencePiece's types.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


@dataclass(frozen=True)
class Added:
    """An added token with the flags of published files."""

    text: str
    special: bool = True
    rstrip: bool = False

    def entry(self) -> dict[str, Any]:
        """The flags as `added_tokens_decoder` has them."""
        flags = {"lstrip": False, "normalized": False, "rstrip": self.rstrip, "single_word": False}
        return {"content": self.text, **flags, "special": self.special}


@dataclass(frozen=True)
class Made(ABC):
    """A tokenizer to be written. `first`: the added tokens have the first ids, as SmolLM2's, else the last.

    `begin` and `stops` go into the model's configs, by text; `template` is xtuner's name of the prompt.
    """

    added: tuple[Added, ...]
    stops: tuple[str, ...]
    template: str
    config: Mapping[str, Any]
    begin: str | None = None

    def write(self, folder: Path) -> tuple[int | None, list[int]]:
        """The files; returns the id of `begin`, and those of `stops`."""
        ids = self.files(folder)
        decoder = {str(ids[each.text]): each.entry() for each in self.added}
        _write_json(folder / "tokenizer_config.json", {**self.config, "added_tokens_decoder": decoder})
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {key: self.config[key] for key in names if self.config.get(key) is not None}
        _write_json(folder / "special_tokens_map.json", special)
        return None if self.begin is None else ids[self.begin], [ids[each] for each in self.stops]

    @abstractmethod
    def files(self, folder: Path) -> dict[str, int]:
        """Write the vocabulary; returns the id of each added token by its text."""


@dataclass(frozen=True)
class ByteLevel(Made):
    """Byte-level BPE. Without `split` words are cut as GPT-2 cuts them, and each digit stands alone."""

    split: str | None = None
    normalizer: str | None = None
    first: bool = False
    ignore_merges: bool = False

    def files(self, folder: Path) -> dict[str, int]:
        texts = [each.text for each in self.added]
        learning = Tokenizer(models.BPE())
        learning.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = trainers.BpeTrainer(
            vocab_size=600 + len(texts),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=texts if self.first else [],
            show_progress=False,
        )
        learning.train_from_iterator(CORPUS, trainer)
        model = json.loads(learning.to_str())["model"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        made = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=self.ignore_merges))
        if self.normalizer is not None:
            made.normalizer = getattr(normalizers, self.normalizer)()
        made.pre_tokenizer = self._cut()
        made.decoder = decoders.ByteLevel()
        made.add_tokens([AddedToken(each.text, special=each.special, normalized=False) for each in self.added])
        made.add_special_tokens(
            [AddedToken(e.text, special=True, normalized=False, rstrip=e.rstrip) for e in self.added if e.special]
        )
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        made.save(str(folder / "tokenizer.json"))
        return {text: made.token_to_id(text) for text in texts}

    def _cut(self) -> pre_tokenizers.PreTokenizer:
        if self.split is None:
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
        cut = pre_tokenizers.Split(Regex(self.split), "isolated")
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True)
class SentencePiece(Made):
    """SentencePiece BPE with byte fallback: tokenizer.model, tokenizer.json, or both of `kinds`.

    With `once` a space is put in front of the whole text alone, as transformers does where `legacy` is false; else in
    front of every piece of text between added tokens.
    """

    kinds: tuple[str, ...] = ("tokenizer.model",)
    once: bool = False
    post: Sequence[str] = field(default=("<s>",))

    def files(self, folder: Path) -> dict[str, int]:
        pieces = learnt_pieces()
        ids = {text: i for i, (text, _, _) in enumerate(pieces)}
        for each in self.added:
            ids.setdefault(each.text, len(ids))
        if "tokenizer.model" in self.kinds:
            (folder / "tokenizer.model").write_bytes(model_file(pieces))
            later = {each.text: ids[each.text] for each in self.added if ids[each.text] >= len(pieces)}
            _write_json(folder / "added_tokens.json", later)
        if "tokenizer.json" in self.kinds:
            _write_json(folder / "tokenizer.json", self._fast(pieces, ids))
        return ids

    def _fast(self, pieces: list[tuple[str, float, int]], ids: Mapping[str, int]) -> dict[str, Any]:
        """As transformers converts a SentencePiece model."""
        put: list[dict[str, Any]] = [{"SpecialToken": {"id": text, "type_id": 0}} for text in self.post]
        first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        metaspace = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        cut = (
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False} if self.once else None
        )
        decoder: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
        vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": ids[each.text], **each.entry()} for each in self.added],
            "normalizer": None if self.once else {"type": "Sequence", "normalizers": metaspace},
            "pre_tokenizer": cut,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [*put, first],
                "pair": [*put, first, *put, second],
                "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in self.post},
            },
            "decoder": {"type": "Sequence", "decoders": decoder},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [" ".join(pair) for pair in _every_merge(pieces, vocab)],
            },
        }


def learnt_pieces() -> list[tuple[str, float, int]]:
    """Text, score and type: Llama-2's order, with fewer merges; the last ones are single characters."""
    learning = Tokenizer(models.BPE())
    learning.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learning.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=560, show_progress=False))
    model = json.loads(learning.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].get)
    found = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    found += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    ordered = [*(t for t in texts if len(t) > 1), *(t for t in texts if len(t) == 1)]
    return found + [(text, -float(rank), NORMAL) for rank, text in enumerate(ordered)]


def _every_merge(pieces: list[tuple[str, float, int]], vocab: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    for text, _, kind in pieces:
        if kind == NORMAL:
            cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
            yield from sorted(
                (c for c in cuts if c[0] in vocab and c[1] in vocab), key=lambda c: (vocab[c[0]], vocab[c[1]])
            )


def model_file(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """sentencepiece_model.proto: pieces are field 1; the trainer's settings 2, the normalizer's 3."""

    def number(place: int, value: int) -> bytes:
        return _varint(place << 3) + _varint(value)

    def block(place: int, content: bytes) -> bytes:
        return _varint(place << 3 | 2) + _varint(len(content)) + content

    data = b"".join(
        block(1, block(1, text.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    trainer = number(3, 2) + number(35, 1) + number(40, 0) + number(41, 1) + number(42, 2)
    return data + block(2, trainer) + block(3, block(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1))


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _llama2(**more: Any) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizer",
        **more,
    }


_LLAMA2 = tuple(Added(text) for text in ("<unk>", "<s>", "</s>"))
# Phi-3's: most of its tokens take the white space behind them along, and </s> is not special.
_PHI3 = (
    *(Added("<unk>"), Added("<s>"), Added("</s>", special=False, rstrip=True), Added("<|endoftext|>")),
    *(Added(f"<|{name}|>", rstrip=True) for name in ("assistant", "placeholder1", "system", "end", "user")),
)
_PHI3_CONFIG = _llama2(
    add_bos_token=False, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML_CONFIG: dict[str, Any] = {
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 8192,
}
_PHI3_STOPS = ("<|endoftext|>", "<|assistant|>", "<|end|>")

MADE: dict[str, Made] = {
    "qwen2": ByteLevel(
        (*map(Added, _CHATML), Added("<tool_call>", special=False)),
        ("<|im_end|>", "<|endoftext|>"),
        "qwen_chat",
        _CHATML_CONFIG
        | {"add_bos_token": False, "bos_token": None, "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
        | {"errors": "replace", "split_special_tokens": False, "unk_token": None},
        begin="<|endoftext|>",
        split=QWEN2,
        normalizer="NFC",
    ),
    "smollm": ByteLevel(
        tuple(map(Added, (*_CHATML, "<repo_name>", "<empty_output>"))),
        ("<|im_end|>",),
        "qwen_chat",
        _CHATML_CONFIG
        | {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        | {"tokenizer_class": "GPT2Tokenizer", "vocab_size": 49152},
        begin="<|im_start|>",
        first=True,
    ),
    "phi-4": ByteLevel(
        (Added("<|endoftext|>"), *(Added(f"<|{name}|>") for name in ("assistant", "end", "user", "system"))),
        ("<|endoftext|>", "<|end|>"),
        "phi3_chat",
        _CHATML_CONFIG
        | {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        | {"unk_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer", "add_bos_token": False},
        begin="<|endoftext|>",
        split=GPT4O,
    ),
    "llama-2": SentencePiece(_LLAMA2, ("</s>",), "llama2_chat", _llama2(), begin="<s>"),
    "llama-2-json": SentencePiece(
        _LLAMA2, ("</s>",), "llama2_chat", _llama2(), begin="<s>", kinds=("tokenizer.json",)
    ),
    "once": SentencePiece(
        _LLAMA2, ("</s>",), "mistral", _llama2(legacy=False), begin="<s>", kinds=("tokenizer.json",), once=True
    ),
    "vicuna": SentencePiece(
        (*_LLAMA2, Added("<pad>")), ("</s>",), "vicuna", _llama2(pad_token="<pad>"), begin="<s>"
    ),
    "phi-3": SentencePiece(
        _PHI3, _PHI3_STOPS, "phi3_chat", _PHI3_CONFIG, begin="<s>", kinds=("tokenizer.model", "tokenizer.json"), post=()
    ),
    "phi-3-json": SentencePiece(
        _PHI3, _PHI3_STOPS, "phi3_chat", _PHI3_CONFIG, begin="<s>", kinds=("tokenizer.json",), post=()
    ),
}  # fmt: skip
