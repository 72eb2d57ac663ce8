"""The prompt that a model was trained with, as text: what comes before a question, and what an answer ends with.

A chat template is a program, and a conversion runs none: a template is told by its text, which is that of a row of
mappings/prompt_templates.toml when training, or an earlier conversion, or the user named it.
"""

from __future__ import annotations

from llava_convert.assets.bundle import Artefacts
from llava_convert.assets.prompts import PromptTemplate, chat_template, prompt_template, prompt_templates
from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN
from llava_convert.core.errors import ConvertError
from llava_convert.core.values import dataclass

QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Prompt:
    """One turn of a known template. `name` is xtuner's, None for one that a training config spells out.

    `bos` stands in front; `added` says that the tokenizer puts it there by itself.
    """

    name: str | None
    row: PromptTemplate
    bos: str
    added: bool
    ends: tuple[str, ...]

    def text(self, said: str, *, bos: bool = True) -> str:
        """The whole prompt for one message, up to where the answer begins."""
        return (self.bos if bos else "") + self.row.user.format(input=said, round=1) + self.row.assistant

    @property
    def about_picture(self) -> str:
        return self.text(f"{IMAGE_TOKEN}\n{QUESTION}")

    @property
    def typed(self) -> str:
        """What a program that adds the BOS by itself, or not, is given."""
        return self.text(f"{IMAGE_TOKEN}\n{QUESTION}", bos=not self.added)


def prompt_of(made: Artefacts) -> Prompt | None:
    """The prompt of a model, None where its template is none that is known here by name."""
    tokenizer = made.tokenizer
    found = made.template_name
    if found is None and tokenizer is not None and tokenizer.chat_template is not None:
        found = _name_of(tokenizer.chat_template, tokenizer)
    if found is None:
        return None
    try:
        row = prompt_template(found)
    except ConvertError:
        return None
    written = made.templates.tokenizer or ""
    bos = (tokenizer.bos if tokenizer is not None else None) or ""
    ends = row.stop_words or ((tokenizer.eos,) if tokenizer is not None and tokenizer.eos else ())
    return Prompt(
        name=found if isinstance(found, str) else None,
        row=row,
        bos=bos if bos and written == chat_template(found, bos_token=bos) else "",
        added=tokenizer is not None and tokenizer.adds_bos,
        ends=tuple(ends),
    )


def _name_of(template: str, tokenizer: Tokenizer) -> str | None:
    """The row whose chat template has this very text."""
    for name in prompt_templates():
        for bos in (tokenizer.bos, None):
            if template in (chat_template(name, bos_token=bos), chat_template(name, bos_token=bos, first_bos=False)):
                return name
    return None
