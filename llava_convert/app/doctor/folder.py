"""A folder under examination: its small files, read once, and as they are to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from llava_convert.assets.tokenizer.files import CONFIG, PROCESSOR_TEMPLATE, TEMPLATE, Tokenizer, open_tokenizer
from llava_convert.core.errors import InputError
from llava_convert.core.text import to_json
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import Checkpoint
from llava_convert.storage.sidecars import Sidecars

GENERATION, PROCESSOR, PREPROCESSOR = "generation_config.json", "processor_config.json", "preprocessor_config.json"
TEMPLATES = (TEMPLATE, PROCESSOR_TEMPLATE)


@dataclass
class Folder:
    """What a consumer reads of a folder. `changed` are files with other content than on disk."""

    checkpoint: Checkpoint
    changed: dict[str, bytes] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def beside(self) -> Sidecars:
        return self.checkpoint.beside

    def has(self, name: str) -> bool:
        return name in self.changed or self.beside.has(name)

    def read(self, name: str) -> bytes:
        return self.changed[name] if name in self.changed else self.beside.read(name)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a file, {} where there is none. Raises InputError for another thing."""
        if not self.has(name):
            return {}
        if name not in self.changed:
            return self.beside.read_object(name)
        found: dict[str, Any] = json.loads(self.changed[name])
        return found

    def set(self, name: str, values: Mapping[str, Any]) -> None:
        """Give a file's object these values, and keep the others."""
        self.changed[name] = to_json({**self.json(name), **values})

    def put(self, name: str, text: str) -> None:
        self.changed[name] = text.encode()

    @property
    def tokenizer(self) -> Tokenizer | None:
        try:
            return self.beside.once("tokenizer", lambda: open_tokenizer(self.beside))
        except InputError:
            return None

    def token(self, name: str) -> str | None:
        """A special token of tokenizer_config.json: `eos_token`, `pad_token`, …"""
        value = self.json(CONFIG).get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def id_of(self, token: str | None) -> int | None:
        return self.tokenizer.id_of(token) if self.tokenizer is not None and token is not None else None

    @property
    def template(self) -> str | None:
        """The chat template of the tokenizer, else that of the processor."""
        found = self.json(CONFIG).get("chat_template")
        if isinstance(found, str):
            return found
        return self.processor_template

    @property
    def processor_template(self) -> str | None:
        if self.has(TEMPLATE):
            return self.read(TEMPLATE).decode("utf-8", "replace")
        found = self.json(PROCESSOR_TEMPLATE).get("chat_template")
        return found if isinstance(found, str) else None
