"""A tokenizer as files: its vocabulary read cheaply, LLaVA's tokens added and taken away by editing JSON.

Nothing here is re-serialised by a tokenizer library. A save by transformers 5.x or tokenizers >= 0.20 writes files that
older releases cannot parse (merges as pairs, `TokenizersBackend`), so every byte that need not change stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from llava_convert.errors import InputError
from llava_convert.sentencepiece import read_pieces
from llava_convert.storage.jsonfile import parse_json
from llava_convert.tokenizer_json import edit_added_tokens, has_type, starts_with
from llava_convert.tokenizer_shape import require_shape

IMAGE_TOKEN, PAD_TOKEN, UNK_TOKEN = "<image>", "<pad>", "<unk>"
ROW_MULTIPLE = 64  # xtuner's pad_shape: rows are padded to it when a token gets a new one
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
FILES = (*VOCABULARY_FILES, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE, PROCESSOR_TEMPLATE)

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of one folder; each is parsed when it is first asked for."""

    folder: Path
    files: tuple[str, ...]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def _text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.folder / name}: not UTF-8 text (byte {error.start})") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, {} where the file is missing. Raises InputError where it is no JSON object."""
        return _json_object(self.read(name), self.folder / name) if name in self.files else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.read_json(CONFIG)

    @cached_property
    def fast(self) -> dict[str, Any]:
        """tokenizer.json, {} where there is none."""
        return self.read_json("tokenizer.json")

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens beside the model's vocabulary, by id, in the form of `added_tokens_decoder`, lowest id first."""
        named = {_content(value) for value in (*self.config.values(), *self.read_json(SPECIAL_MAP).values())}
        found = {i: {"content": text, **_FLAGS, "special": text in named} for text, i in self.read_json(ADDED).items()}
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
            pieces = read_pieces(self.read("tokenizer.model"), self.folder / "tokenizer.model")
            found = {piece: i for i, piece in enumerate(pieces)}
        else:
            found = self.read_json("vocab.json")
        return found | {str(entry["content"]): i for i, entry in self.added.items()}

    @property
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
                return _content(source[key])
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


@dataclass(frozen=True)
class AddedToken:
    """A token which the conversion adds; special, and matched in the raw text."""

    id: int
    content: str

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "content": self.content}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> AddedToken:
        return cls(int(record["id"]), str(record["content"]))


@dataclass(frozen=True)
class TokenPlan:
    """The ids of LLaVA's tokens, those to add, and how many embedding rows the result has."""

    image_id: int
    pad_id: int
    added: tuple[AddedToken, ...]
    rows_out: int


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises InputError where there is no vocabulary."""
    files = tuple(name for name in FILES if (folder / name).is_file())
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json)",
            hint="name the base model with --llm, whose tokenizer is taken",
        )
    stats = [(folder / name).stat() for name in files]
    return _opened(folder, files, tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats))


@lru_cache(maxsize=2)
def _opened(folder: Path, files: tuple[str, ...], stamps: tuple[tuple[int, int, int], ...]) -> Tokenizer:
    """One object for one state of the files: `inspect` plans for every target, and a Llama-3 tokenizer has 9 MB."""
    return Tokenizer(folder, files)


def plan_llava_tokens(tokenizer: Tokenizer, rows: int) -> TokenPlan:
    """The ids which xtuner's converter gives on an embedding of `rows` rows.

    It loads the tokenizer as LlamaTokenizerFast, which adds `<unk>` where no unk_token is stated (a stated null adds
    none; measured in transformers 4.43.4), then adds `<image>` and `<pad>`. Rows grow to a multiple of 64 when an id
    has none; the real one compares the pad id with the rows wrongly and can leave the last id without a row.
    Raises InputError where there are fewer rows than tokens.
    """
    require_rows(tokenizer, rows)
    size = tokenizer.size
    ids = {entry["content"]: i for i, entry in tokenizer.added.items()}
    added: list[AddedToken] = []
    wanted = [IMAGE_TOKEN, PAD_TOKEN]
    stated = {*tokenizer.config, *tokenizer.read_json(SPECIAL_MAP)}
    if "unk_token" not in stated and tokenizer.id_of(UNK_TOKEN) is None:
        wanted.insert(0, UNK_TOKEN)
    for token in wanted:
        if token not in ids:
            # A piece of the model's vocabulary keeps its id: it is only made a token that is matched whole.
            found = tokenizer.id_of(token)
            ids[token] = size if found is None else found
            size = max(size, ids[token] + 1)
            added.append(AddedToken(ids[token], token))
    rows_out = rows if size <= rows else -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    return TokenPlan(ids[IMAGE_TOKEN], ids[PAD_TOKEN], tuple(added), rows_out)


def require_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Raise InputError unless each token has a row of the embedding."""
    if rows < tokenizer.size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.size} tokens, but the embedding only {rows} rows",
            hint="give the base model that the checkpoint was trained from with --llm",
        )


def with_tokens(
    tokenizer: Tokenizer,
    plan: TokenPlan,
    *,
    chat_template: str | None = None,
    processor_template: str | None = None,
) -> dict[str, bytes]:
    """The files of the transformers layout, by name.

    `chat_template` is written for the tokenizer (4.x reads tokenizer_config.json, 5.x the .jinja file; by default the
    one that is there); `processor_template`, where it differs, as chat_template.json, which only processors
    read, before the .jinja (transformers 4.46 to 5.23).
    """
    files = {name: tokenizer.read(name) for name in VOCABULARY_FILES if name in tokenizer.files}
    if "tokenizer.json" in files and plan.added:
        entries = [{"id": t.id, "content": t.content, **_FLAGS, "special": True} for t in plan.added]
        files["tokenizer.json"] = edit_added_tokens(files["tokenizer.json"], tokenizer.fast, entries, frozenset())
    decoder = tokenizer.added | {t.id: {"content": t.content, **_FLAGS, "special": True} for t in plan.added}

    config = dict(tokenizer.config)
    if isinstance(extra := config.get("extra_special_tokens"), list):
        # 5.x writes a list where 4.x wants a dict and crashes; both read the list under its old name.
        del config["extra_special_tokens"]
        config.setdefault("additional_special_tokens", extra)
    config["added_tokens_decoder"] = {str(i): decoder[i] for i in sorted(decoder)}
    named = {"pad_token": PAD_TOKEN}
    if any(t.content == UNK_TOKEN for t in plan.added):
        named["unk_token"] = UNK_TOKEN
    config |= named
    config["processor_class"] = "LlavaProcessor"
    if (kind := _loadable_class(tokenizer)) is not None:
        config["tokenizer_class"] = kind
    template = chat_template or tokenizer.chat_template
    if template is not None:
        config["chat_template"] = template
        files[TEMPLATE] = template.encode()
        if processor_template not in (None, template):
            files[PROCESSOR_TEMPLATE] = _dump({"chat_template": processor_template})
    special = tokenizer.read_json(SPECIAL_MAP)
    for key in ("bos_token", "eos_token", "unk_token"):
        if key not in special and isinstance(value := config.get(key), str | dict):
            # This file's fields go to AddedToken as they are, where tokenizer_config.json's carry their type.
            special[key] = {k: v for k, v in value.items() if k != "__type"} if isinstance(value, dict) else value
    files[CONFIG] = _dump(config)
    files[SPECIAL_MAP] = _dump(special | named)
    # The slow classes of transformers before 4.34 know added tokens from this file alone.
    if "tokenizer.json" not in files or "tokenizer.model" in files or ADDED in tokenizer.files:
        base = tokenizer.read_json(ADDED)
        files[ADDED] = _dump(base | {t.content: t.id for t in plan.added})
    return files


def plain_files(tokenizer: Tokenizer, chat_template: str | None = None) -> dict[str, bytes]:
    """The files as they are; a `chat_template` given replaces what is there in every file that could hold one."""
    files = {name: tokenizer.read(name) for name in tokenizer.files}
    if chat_template is not None:
        files[CONFIG] = _dump(tokenizer.config | {"chat_template": chat_template})
        if TEMPLATE in files:
            files[TEMPLATE] = chat_template.encode()
        if PROCESSOR_TEMPLATE in files:
            files[PROCESSOR_TEMPLATE] = _dump({"chat_template": chat_template})
    return files


def without_tokens(
    tokenizer: Tokenizer, added: Iterable[AddedToken], restore: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The files less the tokens which a conversion recorded as added; the way back from `with_tokens`.

    `restore` is what `undo_record` gave then: it also brings back what the conversion changed in the small files.
    """
    gone = frozenset((t.id, t.content) for t in added)
    files = {name: tokenizer.read(name) for name in tokenizer.files}
    if "tokenizer.json" in files and gone:
        files["tokenizer.json"] = edit_added_tokens(files["tokenizer.json"], tokenizer.fast, [], gone)
    for name in (CONFIG, SPECIAL_MAP, ADDED):
        if name in files:
            files[name] = _dump(_stripped(_json_object(files[name], tokenizer.folder / name), gone))
    for name, change in (restore or {}).items():
        if change is None:
            files.pop(name, None)
        elif "text" in change:
            files[name] = str(change["text"]).encode()
        else:
            now = _json_object(files.get(name, b"{}"), tokenizer.folder / name)
            kept = {key: value for key, value in now.items() if key not in change["drop"]}
            files[name] = _dump(kept | change["set"])
    return files


def undo_record(before: Mapping[str, bytes], plan: TokenPlan, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `without_tokens` must restore, beside the tokens, to make `before`'s small files of `files` again.

    `before` is what `plain_files` gives: the tokenizer without LLaVA's tokens, with the chat template trained with.
    """
    gone = frozenset((t.id, t.content) for t in plan.added)
    record: dict[str, Any] = {}
    for name in (CONFIG, SPECIAL_MAP, ADDED, PROCESSOR_TEMPLATE):
        if name in before:
            old, now = _json_object(before[name], Path(name)), _stripped(json.loads(files.get(name, b"{}")), gone)
            lost = object()
            changed = {key: value for key, value in old.items() if now.get(key, lost) != value}
            drop = [key for key in now if key not in old]
            if changed or drop or name not in files:
                record[name] = {"set": changed, "drop": drop}
        elif name in files:
            record[name] = None
    if TEMPLATE in before:
        if files.get(TEMPLATE) != before[TEMPLATE]:
            record[TEMPLATE] = {"text": before[TEMPLATE].decode()}
    elif TEMPLATE in files:
        record[TEMPLATE] = None
    return record


def _stripped(found: dict[str, Any], gone: frozenset[tuple[int, str]]) -> dict[str, Any]:
    """A small file's object without the tokens, the settings which name them, and the processor's class."""
    contents = {content for _, content in gone}
    kept: dict[str, Any] = {}
    for key, value in found.items():
        if key == "added_tokens_decoder":
            value = {i: entry for i, entry in value.items() if (int(i), entry["content"]) not in gone}
        elif (isinstance(value, int) and (value, key) in gone) or (key, value) == ("processor_class", "LlavaProcessor"):
            continue  # an entry of added_tokens.json, or the processor's
        if key.endswith("_token") and _content(value) in contents:
            continue
        kept[key] = value
    return kept


def _loadable_class(tokenizer: Tokenizer) -> str | None:
    """A `tokenizer_class` that every release since 4.37 loads rightly.

    LlamaTokenizer on a byte-level BPE makes 5.0 rebuild it with Metaspace: wrong ids, silently. TokenizersBackend does
    not exist before 5.0.
    """
    stated = tokenizer.config.get("tokenizer_class")
    name = stated if isinstance(stated, str) else None
    unloadable = name in (None, "TokenizersBackend")
    if "auto_map" in tokenizer.config:
        return name
    if not tokenizer.fast:
        return "LlamaTokenizer" if unloadable and "tokenizer.model" in tokenizer.files else name
    return "PreTrainedTokenizerFast" if unloadable or (tokenizer.is_llama and tokenizer.byte_level) else name


def _content(value: Any) -> str | None:
    """The text of a special token, written as a string or as an AddedToken's fields."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _json_object(data: bytes, path: Path) -> dict[str, Any]:
    found = parse_json(data, str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    # Half a surrogate pair can be written in JSON (\\ud800) and not in the files that are made of it.
    if b"\\ud" in data.lower() and not _is_text(json.dumps(found, ensure_ascii=False)):
        raise InputError(f"{path}: holds an escape (\\ud...) that is no character", hint="get the file again")
    require_shape(path.name, found, path)
    return found


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
