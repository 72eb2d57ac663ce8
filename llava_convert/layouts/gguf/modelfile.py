"""Ollama's Modelfile: the two files of a model, its prompt, where it stops, how much it reads.

The prompt is written out as a Go template from the same row of mappings/prompt_templates.toml as the chat template:
Ollama takes a GGUF's own (Jinja) template only where it knows that very text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from llava_convert.assets.prompts import PromptTemplate, prompt_template
from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.core.errors import UnsupportedError

# A picture takes 576 of them for the usual tower; more costs memory on every machine, and `num_ctx` can be raised.
MOST_CONTEXT = 4096


def modelfile(
    llm: Sequence[str],
    mmproj: str | None,
    *,
    template: str | Mapping[str, Any] | None,
    tokenizer: Tokenizer | None,
    stops: Sequence[str],
    context: int | None,
    has_own: bool,
) -> bytes:
    """The Modelfile of a language model's file, or its parts, and its mmproj, all beside it.

    `has_own` says that the GGUF has a chat template.
    """
    lines = [f"FROM ./{llm[0]}"]
    if len(llm) > 1:
        lines.insert(
            0, f"# Ollama wants a model in one file, this one is in {len(llm)}: convert without --max-shard-size"
        )
    if mmproj is not None:
        lines.append(f"FROM ./{mmproj}")
    text = None if template is None else go_template(template, tokenizer)
    if text is not None:
        lines.append(f'TEMPLATE """{text}"""')
    else:
        own = "that of the GGUF's own chat template, where Ollama knows it" if has_own else "not known"
        lines.append(f"# No TEMPLATE: the prompt is {own}.")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops)]
    lines.append(f"PARAMETER num_ctx {min(context or MOST_CONTEXT, MOST_CONTEXT)}")
    return ("\n".join(lines) + "\n").encode()


def go_template(name: str | Mapping[str, Any], tokenizer: Tokenizer | None) -> str | None:
    """A prompt template in Ollama's language, turn by turn; None for one that it cannot say (numbered rounds).

    The first BOS is left to the runtime, which puts it in front of every prompt.
    """
    try:
        row = prompt_template(name)
    except UnsupportedError:
        return None
    if "{round}" in row.user:
        return None
    bos = (tokenizer.bos if tokenizer else None) or ""
    eos = (tokenizer.eos if tokenizer else None) or ""
    # After a turn that ends with the EOS the next one begins with its BOS, as in training.
    ends = "" if row.suffix_is_eos else eos
    begins = "" if row.suffix_is_eos or not bos else f"{{{{ if gt $i 1 }}}}{_literal(bos)}{{{{ end }}}}"
    system = "" if row.system is None else _filled(row.system)
    return "".join(
        (
            "{{- range $i, $_ := .Messages }}",
            '{{- if eq .Role "system" }}',
            system,
            '{{- else if eq .Role "user" }}',
            begins,
            _filled(row.user),
            '{{- else if eq .Role "assistant" }}',
            _answer(row, ends),
            "{{- end }}",
            "{{- end }}",
            _literal(row.assistant),
        )
    )


def _answer(row: PromptTemplate, ends: str) -> str:
    return f"{_literal(row.assistant)}{{{{ .Content }}}}{_literal(row.suffix + ends + row.sep)}"


def _filled(pattern: str) -> str:
    """A row's text with what was said in its place."""
    parts = []
    for literal, field, _, _ in Formatter().parse(pattern):
        parts.append(_literal(literal))
        if field is not None:
            parts.append("{{ .Content }}")
    return "".join(parts)


def _literal(text: str) -> str:
    """Text as a string of the template's, so that the trimming of neighbouring actions (`{{-`) does not touch it."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
