"""Conversations as a model was trained on them: rendered by its chat template, cut at its pictures, encoded."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.assets.prompts import prompt_template
from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.values import dataclass

IMAGE = "<image>"

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`, with `<image>` where a picture stands."""


@dataclass(frozen=True)
class Words:
    """A tokenizer of transformers, the chat template, and where generation ends.

    `stop_ids` are tokens; `stop_words` are those of the template that are several tokens each.
    """

    tokenizer: Any
    template: str
    stop_ids: tuple[int, ...]
    stop_words: tuple[str, ...]

    @classmethod
    def of(cls, made: Artefacts) -> Words:
        """The words of a model. Raises InputError without a tokenizer or a template, UnsupportedError for its code."""
        tokenizer = made.required_tokenizer()
        template = made.templates.tokenizer
        if template is None:
            raise InputError(
                "nothing says how the model is prompted",
                hint="give its template by --prompt-template (vicuna for LLaVA-1.5, llama3_chat for Llama-3)",
            )
        named = made.template_name
        words = prompt_template(named).stop_words if named else ()
        stated = made.generation_config.get("eos_token_id")
        ids = tuple(stated) if isinstance(stated, list) else (stated,) if type(stated) is int else ()
        return cls(_opened(made), template, ids, tuple(word for word in words if tokenizer.id_of(word) is None))

    @property
    def pad_id(self) -> int:
        """What finished rows would be filled with: nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0] if self.stop_ids else 0)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the answer begins. Raises UnsupportedError for a role it lacks."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as problem:
            raise UnsupportedError(
                f"the model's chat template refuses this conversation: {problem}",
                hint="--prompt-template NAME asks with another one",
            ) from problem
        return text

    def chunks(self, messages: Sequence[Message]) -> list[list[int]]:
        """The ids before, between and after the pictures.

        Each piece is encoded alone, as xtuner (tools/mmbench.py) and LLaVA (mm_utils.py, tokenizer_image_token) do.
        """
        encode = self.tokenizer.encode
        return [encode(piece, add_special_tokens=False) for piece in self.rendered(messages).split(IMAGE)]

    def decoded(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def _opened(made: Artefacts) -> Any:
    """transformers' tokenizer of the model's own files, those that an earlier conversion added left out."""
    from transformers import AutoTokenizer

    # Of each tokenizer of byte pairs it warns that it does not clean up spaces, which none should.
    logging.getLogger("transformers.tokenization_utils_tokenizers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="llava-convert-") as folder:
        for name, data in made.tokenizer_files().items():
            (Path(folder) / name).write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, ImportError) as problem:
            raise UnsupportedError(
                f"transformers cannot load the model's tokenizer: {problem}",
                hint="--config-from takes the folder of a tokenizer that it loads",
            ) from problem
