"""A tokenizer as the files that it lies in: its vocabulary and its special tokens, read cheaply.

Nothing is loaded by a tokenizer library: a Llama-3 tokenizer costs a tenth of a second so, and every family is read
alike.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_convert.assets.tokenizer.checks import require_shape
from llava_convert.assets.tokenizer.json_edit import has_type, starts_with
from llava_convert.core.errors import InputError
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass
from llava_convert.storage.json_files import parse_json
from llava_convert.storage.sentencepiece import read_pieces
from llava_convert.storage.sidecars import Sidecars

UNK_TOKEN = "<unk>"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
FILES = (*VOCABULARY_FILES, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE, PROCESSOR_TEMPLATE)
# The flags of an added token which nothing says more of.
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_CODE = "auto_map"
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of one place; each is parsed when it is first asked for.

    Where tokenizer.json is the same as that of `like`, which has parsed it, it is not parsed again.
    """

    sidecars: Sidecars
    files: tuple[str, ...]
    like: Tokenizer | None = None

    @property
    def where(self) -> Path:
        """The folder or file that it is of, for messages."""
        return self.sidecars.where

    def read(self, name: str) -> bytes:
        """The bytes of a file; of the config without the code that it asks for, which no output has."""
        return to_json(self.config) if name == CONFIG and self.needs_code else self.sidecars.read(name)

    def _text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where / name}: not UTF-8 text (byte {error.start})") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, {} where the file is missing. Raises InputError where it is no JSON object."""
        return tokenizer_object(self.read(name), self.where / name) if name in self.files else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self._stated.items() if key != _CODE}

    @property
    def needs_code(self) -> bool:
        """Whether the config names a class of the model's own code."""
        return _CODE in self._stated

    @cached_property
    def _stated(self) -> dict[str, Any]:
        return tokenizer_object(self.sidecars.read(CONFIG), self.where / CONFIG) if CONFIG in self.files else {}

    @cached_property
    def fast(self) -> dict[str, Any]:
        """tokenizer.json, {} where there is none."""
        name, like = "tokenizer.json", self.like
        if like is not None and name in like.files and name in self.files and like.read(name) == self.read(name):
            return like.fast
        return self.read_json(name)

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens beside the model's vocabulary, by id, in the form of `added_tokens_decoder`, lowest id first."""
        named = {content_of(value) for value in (*self.config.values(), *self.read_json(SPECIAL_MAP).values())}
        found = {i: {"content": text, **FLAGS, "special": text in named} for text, i in self.read_json(ADDED).items()}
        # tokenizer.json is written last since it is what a fast tokenizer goes by.
        for i, entry in (self.config.get("added_tokens_decoder") or {}).items():
            found[int(i)] = dict(entry)
        for entry in self.fast.get("added_tokens") or ():
            found[entry["id"]] = {key: entry[key] for key in sorted(entry) if key != "id"}
        return dict(sorted(found.items()))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, those added included."""
        model = self.fast.get("model") or {}
        if "vocab" in model:
            vocab = model["vocab"]
            found = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        elif "tokenizer.model" in self.files:
            pieces = read_pieces(self.read("tokenizer.model"), self.where / "tokenizer.model")
            found = {piece: i for i, piece in enumerate(pieces)}
        else:
            found = self.read_json("vocab.json")
        return found | {str(entry["content"]): i for i, entry in self.added.items()}

    @cached_property
    def texts(self) -> dict[int, str]:
        """The token of every id."""
        return {i: text for text, i in self.vocabulary.items()}

    @cached_property
    def size(self) -> int:
        """Highest id plus one: the rows that an embedding must have."""
        return max(self.vocabulary.values(), default=-1) + 1

    def id_of(self, token: str) -> int | None:
        return self.vocabulary.get(token)

    @property
    def bos(self) -> str | None:
        return self._special("bos_token", "<s>")

    @property
    def eos(self) -> str | None:
        return self._special("eos_token", "</s>")

    @property
    def unk(self) -> str | None:
        return self._special("unk_token", UNK_TOKEN)

    @property
    def pad(self) -> str | None:
        return self._special("pad_token", None)

    def _special(self, key: str, llama_default: str | None) -> str | None:
        for source in (self.config, self.read_json(SPECIAL_MAP)):
            if key in source:  # null is a statement too: the tokenizer has none
                return content_of(source[key])
        # Llama's classes have defaults of their own, so their configs may leave them out.
        return llama_default if llama_default and self.is_llama and llama_default in self.vocabulary else None

    @property
    def is_llama(self) -> bool:
        return str(self.config.get("tokenizer_class", "LlamaTokenizer")).removesuffix("Fast") in _LLAMA_CLASSES

    @property
    def byte_level(self) -> bool:
        """Byte-level BPE (Llama-3, Qwen, GPT-2), as opposed to SentencePiece."""
        return any(has_type(self.fast.get(key), "ByteLevel") for key in ("pre_tokenizer", "decoder"))

    @property
    def adds_bos(self) -> bool:
        """Whether encoding a text with special tokens puts the BOS in front."""
        if self.bos is None:
            return False
        stated = self.config.get("add_bos_token")
        if isinstance(stated, bool):
            return stated
        return starts_with(self.fast.get("post_processor"), self.bos) if self.fast else self.is_llama

    @property
    def chat_template(self) -> str | None:
        """The default chat template, from the file that transformers 5.23 prefers."""
        if TEMPLATE in self.files:
            return self._text(TEMPLATE)
        found = self.config.get("chat_template")
        if isinstance(found, list):  # named templates
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        found = found or self.read_json(PROCESSOR_TEMPLATE).get("chat_template")
        return found if isinstance(found, str) else None


def has_tokenizer(files: Sidecars) -> bool:
    """Whether a vocabulary is among the files."""
    return any(files.has(name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def open_tokenizer(files: Sidecars, like: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer among the files, which may be the same as `like`.

    Raises InputError where there is no vocabulary.
    """
    names = tuple(name for name in FILES if files.has(name))
    if not has_tokenizer(files):
        raise InputError(
            f"{files.where}: no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json)",
            hint="name the base model with --llm, whose tokenizer is taken",
        )
    # One object for one place: `inspect` plans for every target, and a Llama-3 tokenizer has 9 MB.
    return files.once(Tokenizer, lambda: Tokenizer(files, names, like))


def content_of(value: Any) -> str | None:
    """The text of a special token, written as a string or as an AddedToken's fields."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def tokenizer_object(data: bytes, path: Path) -> dict[str, Any]:
    """The object in a JSON file of a tokenizer. Raises InputError where its parts are not what they must be."""
    found = parse_json(data, str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    # Half a surrogate pair can be written in JSON (\\ud800) and not in the files that are made of it.
    if (b"\\ud" in data or b"\\uD" in data) and not _is_text(json.dumps(found, ensure_ascii=False)):
        raise InputError(f"{path}: holds an escape (\\ud...) that is not a character", hint="get the file again")
    require_shape(path.name, found, path)
    return found


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
