"""LLaVA's tokens put into a tokenizer's files, and taken out again, by editing JSON.

Nothing here is re-serialised by a tokenizer library. A save by transformers 5.x or tokenizers >= 0.20 writes files that
older releases cannot parse (merges as pairs, `TokenizersBackend`), so every byte that need not change stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_convert.assets.tokenizer.files import (
    ADDED,
    CONFIG,
    FLAGS,
    PROCESSOR_TEMPLATE,
    SPECIAL_MAP,
    TEMPLATE,
    UNK_TOKEN,
    VOCABULARY_FILES,
    Tokenizer,
    content_of,
    tokenizer_object,
)
from llava_convert.assets.tokenizer.json_edit import edit_added_tokens
from llava_convert.core.errors import InputError
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass

IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN = "<image>", "<video>", "<pad>"
PROCESSORS = ("LlavaProcessor", "LlavaNextProcessor", "LlavaOnevisionProcessor")  # which the layout's models have
ROW_MULTIPLE = 64  # xtuner's pad_shape: rows are padded to it when a token gets a new one


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

    ids: Mapping[str, int]
    added: tuple[AddedToken, ...]
    rows_out: int

    @property
    def image_id(self) -> int:
        return self.ids[IMAGE_TOKEN]

    @property
    def pad_id(self) -> int:
        return self.ids[PAD_TOKEN]


def plan_llava_tokens(tokenizer: Tokenizer, rows: int, seen: tuple[str, ...] = (IMAGE_TOKEN,)) -> TokenPlan:
    """The ids of the tokens for what is `seen`, and of `<pad>`, as xtuner's converter gives them.

    `rows` are those of the embedding. The converter loads the tokenizer as LlamaTokenizerFast, which adds `<unk>` where
    no unk_token is stated (a stated null adds none; measured in transformers 4.43.4), then adds `<image>` and `<pad>`.
    Rows grow to a multiple of 64 when an id has none; the real one compares the pad id with the rows wrongly and can
    leave the last id without a row.
    Raises InputError where there are fewer rows than tokens.
    """
    require_rows(tokenizer, rows)
    size = tokenizer.size
    ids = {entry["content"]: i for i, entry in tokenizer.added.items()}
    added: list[AddedToken] = []
    wanted = [*seen, PAD_TOKEN]
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
    return TokenPlan({token: ids[token] for token in (*seen, PAD_TOKEN)}, tuple(added), rows_out)


def require_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Raise InputError unless each token has a row of the embedding."""
    if rows < tokenizer.size:
        raise InputError(
            f"{tokenizer.where}: the tokenizer has {tokenizer.size} tokens, but the embedding only {rows} rows",
            hint="--vocab tokens adds a row for each that lacks one (the mean of the others); or give the base model "
            "that the checkpoint was trained from by --llm",
        )


def with_tokens(
    tokenizer: Tokenizer,
    plan: TokenPlan,
    *,
    chat_template: str | None = None,
    processor_template: str | None = None,
    processor: str = "LlavaProcessor",
) -> dict[str, bytes]:
    """The files of the transformers layout, by name.

    `chat_template` is written for the tokenizer (4.x reads tokenizer_config.json, 5.x the .jinja file; by default the
    one that is there); `processor_template`, where it differs, as chat_template.json, which only processors
    read, before the .jinja (transformers 4.46 to 5.23). `processor` is the class of the model's processor.
    """
    files = {name: tokenizer.read(name) for name in VOCABULARY_FILES if name in tokenizer.files}
    if "tokenizer.json" in files and plan.added:
        entries = [{"id": t.id, "content": t.content, **FLAGS, "special": True} for t in plan.added]
        files["tokenizer.json"] = edit_added_tokens(files["tokenizer.json"], tokenizer.fast, entries, frozenset())
    decoder = tokenizer.added | {t.id: {"content": t.content, **FLAGS, "special": True} for t in plan.added}

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
    config["processor_class"] = processor
    if (kind := _loadable_class(tokenizer)) is not None:
        config["tokenizer_class"] = kind
    template = chat_template or tokenizer.chat_template
    if template is not None:
        config["chat_template"] = template
        files[TEMPLATE] = template.encode()
        if processor_template not in (None, template):
            files[PROCESSOR_TEMPLATE] = to_json({"chat_template": processor_template})
    special = tokenizer.read_json(SPECIAL_MAP)
    for key in ("bos_token", "eos_token", "unk_token"):
        if key not in special and isinstance(value := config.get(key), str | dict):
            # This file's fields go to AddedToken as they are, where tokenizer_config.json's carry their type.
            special[key] = {k: v for k, v in value.items() if k != "__type"} if isinstance(value, dict) else value
    files[CONFIG] = to_json(config)
    files[SPECIAL_MAP] = to_json(special | named)
    # The slow classes of transformers before 4.34 know added tokens from this file alone.
    if "tokenizer.json" not in files or "tokenizer.model" in files or ADDED in tokenizer.files:
        base = tokenizer.read_json(ADDED)
        files[ADDED] = to_json(base | {t.content: t.id for t in plan.added})
    return files


def plain_files(tokenizer: Tokenizer, chat_template: str | None = None) -> dict[str, bytes]:
    """The files as they are; a `chat_template` given replaces what is there in every file that could hold one."""
    files = {name: tokenizer.read(name) for name in tokenizer.files}
    if chat_template is not None:
        files[CONFIG] = to_json(tokenizer.config | {"chat_template": chat_template})
        if TEMPLATE in files:
            files[TEMPLATE] = chat_template.encode()
        if PROCESSOR_TEMPLATE in files:
            files[PROCESSOR_TEMPLATE] = to_json({"chat_template": chat_template})
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
            files[name] = to_json(_stripped(tokenizer_object(files[name], tokenizer.where / name), gone))
    for name, change in (restore or {}).items():
        if change is None:
            files.pop(name, None)
        elif "text" in change:
            files[name] = str(change["text"]).encode()
        else:
            now = tokenizer_object(files.get(name, b"{}"), tokenizer.where / name)
            kept = {key: value for key, value in now.items() if key not in change["drop"]}
            files[name] = to_json(kept | change["set"])
    return files


def undo_record(before: Mapping[str, bytes], plan: TokenPlan, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `without_tokens` must restore, beside the tokens, to make `before`'s small files of `files` again.

    `before` is what `plain_files` gives: the tokenizer without LLaVA's tokens, with the chat template trained with.
    """
    gone = frozenset((t.id, t.content) for t in plan.added)
    record: dict[str, Any] = {}
    for name in (CONFIG, SPECIAL_MAP, ADDED, PROCESSOR_TEMPLATE):
        if name in before:
            old, now = tokenizer_object(before[name], Path(name)), _stripped(json.loads(files.get(name, b"{}")), gone)
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
            value = {i: entry for i, entry in (value or {}).items() if (int(i), entry["content"]) not in gone}
        elif (isinstance(value, int) and (value, key) in gone) or (key == "processor_class" and value in PROCESSORS):
            continue  # an entry of added_tokens.json, or the processor's
        if key.endswith("_token") and content_of(value) in contents:
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
    if tokenizer.needs_code:
        return name
    if not tokenizer.fast:
        return "LlamaTokenizer" if unloadable and "tokenizer.model" in tokenizer.files else name
    return "PreTrainedTokenizerFast" if unloadable or (tokenizer.is_llama and tokenizer.byte_level) else name
