"""Chat templates that say exactly what the model was trained on, and the ids at which it stops.

One BOS. transformers 5.23 adds the tokenizer's BOS in `processor(text=...)`, and in
`processor.apply_chat_template(tokenize=True)` unless the rendered text begins with it;
`tokenizer.apply_chat_template(tokenize=True)` never adds one. So where the tokenizer puts a BOS in front by itself, the
processor's template leaves the first one out (as llava-hf's do), and the tokenizer's template writes it (as Meta's do):
one BOS by every route. Servers which render the processor's template and add no special tokens (vLLM's chat endpoint)
get none then: `--chat-template chat_template.jinja` gives them the tokenizer's.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from string import Formatter
from typing import Any

from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN
from llava_convert.core.errors import UnsupportedError, UsageError
from llava_convert.core.resources import data_dir
from llava_convert.core.text import did_you_mean
from llava_convert.core.values import dataclass

# xtuner gives these no BOS (xtuner/dataset/utils.py, get_bos_eos_token_ids).
_WITHOUT_BOS = ("QWenTokenizer", "Qwen2Tokenizer")

# Text of a message whose content is a list of parts: pictures first, each on its line, however the parts are ordered,
# since xtuner's and LLaVA's data loaders move `<image>\n` to the front and strip the rest. {list} and {into} are set by
# the user of this text. The loop is spelled so that vLLM sees that list content is understood (it looks for a loop over
# message['content']); `image_url` is how OpenAI's clients name a picture.
_FLATTEN = (
    "{%- set part = namespace(images='', text='') -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] in ['image', 'image_url'] -%}{%- set part.images = part.images ~ '" + IMAGE_TOKEN + "\\n' -%}"
    "{%- elif item['type'] == 'text' -%}{%- set part.text = part.text ~ item['text'] -%}"
    "{%- else -%}{{- raise_exception('only image and text can be in a message, not ' ~ item['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set content = (part.images ~ (part.text | trim)) | trim if part.images else part.text -%}"
)


@dataclass(frozen=True)
class PromptTemplate:
    """One row of mappings/prompt_templates.toml, whose head explains the fields."""

    name: str
    user: str
    system: str | None = None
    assistant: str = ""
    suffix: str = ""
    suffix_is_eos: bool = False
    sep: str = ""
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplates:
    """The Jinja templates for the two readers of a transformers folder; None: there is none to write."""

    tokenizer: str | None
    processor: str | None


@cache
def prompt_templates() -> Mapping[str, PromptTemplate]:
    """Every prompt template by its name in xtuner."""
    rows = tomllib.loads((data_dir("mappings") / "prompt_templates.toml").read_text(encoding="utf-8"))
    return {
        name: PromptTemplate(name=name, **{**row, "stop_words": tuple(row.get("stop_words", ()))})
        for name, row in rows.items()
    }


def prompt_template(name: str | Mapping[str, Any]) -> PromptTemplate:
    """A template by xtuner's name for it, or as a training config spells one out (SYSTEM, INSTRUCTION, ...).

    Raises UsageError for a name that xtuner does not know, UnsupportedError for one spelled out without {input}.
    """
    if not isinstance(name, str):
        return _spelled_out(name)
    known = prompt_templates()
    if name not in known:
        near, choices = did_you_mean(name, known), f"--prompt-template takes one of: {', '.join(sorted(known))}"
        raise UsageError(f"unknown prompt template {name!r}", hint=f"{near} {choices}" if near else choices)
    return known[name]


def _spelled_out(keys: Mapping[str, Any]) -> PromptTemplate:
    """xtuner's own keys. Its INSTRUCTION ends with what stands before the answer, which then closes the user's text."""
    user, words = keys.get("INSTRUCTION"), keys.get("STOP_WORDS") or ()
    if not isinstance(user, str) or "{input}" not in user or "{bot_name}" in user:
        raise UnsupportedError(
            "the training config spells out a prompt template that cannot be made a chat template",
            hint="give one by --prompt-template",
        )
    return PromptTemplate(
        name="of the training config",
        user=user,
        system=keys.get("SYSTEM"),
        suffix=str(keys.get("SUFFIX") or ""),
        suffix_is_eos=bool(keys.get("SUFFIX_AS_EOS")),
        sep=str(keys.get("SEP") or ""),
        stop_words=tuple(map(str, words)),
    )


def chat_template(name: str | Mapping[str, Any], *, bos_token: str | None, first_bos: bool = True) -> str:
    """The Jinja template that renders a conversation as xtuner's `name` encodes it for training.

    `bos_token` is the token that training put in front, None where it put none; with `first_bos` false the very first
    is left to the tokenizer. The EOS is the renderer's variable `eos_token`. Needs nothing that transformers' immutable
    sandbox lacks; its `raise_exception` is called for what the template cannot say.
    """
    row = prompt_template(name)
    name = row.name
    ends = "" if row.suffix_is_eos else "{{- eos_token -}}"
    begins = f"{{%- if turn.bos -%}}{{{{- {_quote(bos_token)} -}}}}{{%- set turn.bos = false -%}}{{%- endif -%}}"
    if row.system is None:
        system = f"{{{{- raise_exception('the prompt template {name} has no system message') -}}}}"
    else:
        # xtuner leaves the whole system text out where it is empty.
        system = f"{{%- if content -%}}{{{{- {_expression(row.system)} -}}}}{{%- endif -%}}"
    after = f"{ends}{_emit(row.sep)}" + ("" if row.suffix_is_eos else "{%- set turn.bos = true -%}")
    return "".join(
        (
            f"{{%- set turn = namespace(bos={'true' if first_bos else 'false'}, round=0) -%}}",
            "{%- for message in messages -%}",
            "{%- if message['content'] is string -%}{%- set content = message['content'] -%}",
            "{%- elif not message['content'] -%}{%- set content = '' -%}{%- else -%}",
            _FLATTEN,
            "{%- endif -%}",
            begins if bos_token else "",
            "{%- if message['role'] == 'system' -%}",
            system,
            "{%- elif message['role'] == 'user' -%}{%- set turn.round = turn.round + 1 -%}",
            f"{{{{- {_expression(row.user)} -}}}}",
            "{%- elif message['role'] == 'assistant' -%}",
            f"{_emit(row.assistant)}{{{{- content -}}}}{_emit(row.suffix)}{after}",
            "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{_emit(row.assistant)}{{%- endif -%}}",
        )
    )


def wrap_chat_template(existing: str, *, writes_bos: bool = True) -> str:
    """`existing`, made to take list content: messages are flattened to strings first, then it runs as it was.

    With `writes_bos` false its `bos_token` is empty.
    """
    head = "" if writes_bos else "{%- set bos_token = '' %}\n"
    if IMAGE_TOKEN not in existing:  # else it knows where a picture goes: our own, or llava-hf's
        head += (
            "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
            "{%- if message['content'] is string or not message['content'] -%}"
            "{%- set flat.messages = flat.messages + [message] -%}{%- else -%}"
            + _FLATTEN
            + "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content}] -%}"
            # The line break is eaten by trim_blocks, which every renderer of chat templates sets; a `-` here would
            # also eat white space with which `existing` begins.
            "{%- endif -%}{%- endfor -%}{%- set messages = flat.messages %}\n"
        )
    return head + existing


def same_template(one: str | None, other: str | None) -> bool:
    """Whether two chat templates say the same: alike, or one the other made to take list content."""
    if one == other or one is None or other is None:
        return one == other
    ways = (True, False)
    return other in {wrap_chat_template(one, writes_bos=way) for way in ways} or one in {
        wrap_chat_template(other, writes_bos=way) for way in ways
    }


def hf_templates(tokenizer: Tokenizer, name: str | Mapping[str, Any] | None, given: str | None = None) -> ChatTemplates:
    """The templates for the transformers layout: of the prompt template `name`, else `given`, else the tokenizer's."""
    first_bos = not tokenizer.adds_bos
    if name is not None:
        kind = str(tokenizer.config.get("tokenizer_class", "")).removesuffix("Fast")
        bos = None if kind in _WITHOUT_BOS else tokenizer.bos
        return ChatTemplates(
            chat_template(name, bos_token=bos), chat_template(name, bos_token=bos, first_bos=first_bos)
        )
    existing = given or tokenizer.chat_template
    if existing is None:
        return ChatTemplates(None, None)
    return ChatTemplates(wrap_chat_template(existing), wrap_chat_template(existing, writes_bos=first_bos))


def stop_ids(
    tokenizer: Tokenizer, generation_config: Mapping[str, Any], template: str | Mapping[str, Any] | None
) -> list[int]:
    """Where generation ends: generation_config's ids, the tokenizer's EOS, the template's stop words of one token.

    In this order, each once. Llama-3-Instruct needs it: its config has 128001 alone, its turns end with 128009.
    """
    stated = generation_config.get("eos_token_id")
    ids = [i for i in (stated if isinstance(stated, list) else [stated]) if type(i) is int]
    words = [tokenizer.eos, *(prompt_template(template).stop_words if template else ())]
    ids += [i for word in words if word is not None and (i := tokenizer.id_of(word)) is not None]
    return list(dict.fromkeys(ids))


def _expression(pattern: str) -> str:
    """A row's text as a Jinja expression."""
    values = {"system": "content", "input": "content", "round": "turn.round"}
    terms: list[str] = []
    for literal, field, _, _ in Formatter().parse(pattern):
        terms += [_quote(literal)] * bool(literal) + ([values[field]] if field is not None else [])
    return " ~ ".join(terms)


def _emit(text: str) -> str:
    return f"{{{{- {_quote(text)} -}}}}" if text else ""


def _quote(text: str | None) -> str:
    return json.dumps(text or "", ensure_ascii=False)
