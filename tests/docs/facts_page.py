"""docs/facts.md out of mappings/facts: `python -m tests.docs.facts_page` writes it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_convert.model.tables.facts import Fact, KeyTable, Word, dialects, facts, key_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "facts.md"
LAYOUTS = ("official", "hf", "xtuner", "pth", "gguf")
KIND = {
    "computes": "changes what the model computes",
    "prompts": "changes the prompt",
    "stops": "changes where an answer ends",
    "samples": "sets a default of sampling",
}
# The tables of keys in the order of the page, with what each is about.
FILES = {
    "language_model": "the language model's config, in every layout",
    "vision_tower": "the vision tower's config, in every layout",
    "official": "`config.json` of an official LLaVA, beside the language model's keys",
    "hf": "`config.json` of a transformers LLaVA, beside its two halves",
    "projector": "`projector/config.json` of the xtuner layout",
    "common": "keys that transformers writes into every config",
    "generation": "`generation_config.json`",
    "processor": "`preprocessor_config.json` and `processor_config.json`",
    "tokenizer": "`tokenizer_config.json`",
    "adapter": "`adapter_config.json` of a LoRA",
    "gguf": "the metadata of a GGUF, beside what is made of the facts and the configs",
}
HEAD = """\
# Which settings of a model are kept?

A *fact* is a setting that changes what the model computes, its prompt, or where an answer ends. It stands in a config,
a tokenizer or a processor. A conversion writes each fact into the target. If the target cannot hold it, the conversion
stops with exit 4 and names the fact and its value. `verify` compares facts as it compares tensors. `make docs` writes
this page from the tables in `mappings/facts`.

## Facts by layout

Each table says where a layout stores the fact:

- **A key**: the value is written there.
- **No key**: the programs that read the layout always use the value shown. Any other value is exit 4.
- **Not needed**: the tensors or another key show it, or no program that reads the layout uses it.

transformers has three classes of LLaVA. A model becomes the first class that can hold all its facts: LLaVA (`hf`),
LLaVA-NeXT (`hf.llava_next`) or LLaVA-OneVision (`hf.llava_onevision`). `gguf.siglip` is an mmproj with a SigLIP tower.
"""
KEYS = """\
## Keys by file

A key that changes something is converted. A key that has no effect is listed with the reason. An unknown key in a
model's config is exit 4; `--allow-key NAME` drops it. In other files an unknown key is a note. A value of the wrong
type is exit 3.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *(_fact(fact) for fact in facts().values()), KEYS]
    parts += [_keys(what, key_table(name)) for name, what in FILES.items()]
    return "\n".join(parts)


def _fact(fact: Fact) -> str:
    lines = [f"### {fact.name}", "", f"{_sentence(fact.what)} It {KIND[fact.kind]}.{_default(fact)}{_when(fact)}", ""]
    lines += ["| layout | where it is stored |", "|---|---|"]
    for layout in LAYOUTS:
        usual = fact.layouts.get(layout)
        own = [name for name in dialects(layout) if name == layout or fact.layouts.get(name) != usual]
        lines += [f"| {name} | {_word(fact, fact.layouts.get(name))} |" for name in own]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _default(fact: Fact) -> str:
    return "" if fact.default is None else f" Default: {_value(fact.default)}."


def _when(fact: Fact) -> str:
    if fact.when is None:
        return ""
    name, value = fact.when
    return f" It is used only if `{name}` {'begins with' if isinstance(value, str) else 'is'} {_value(value)}."


def _value(value: Any) -> str:
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _word(fact: Fact, word: Word | None) -> str:
    if word is None:
        return "not needed"
    if word.silent:
        return "not stored: its programs take it as an option"
    if word.loses:
        return f"{_unsaid(word)}. Another value is dropped with a warning: {word.loses}"
    if word.key is None:
        return _unsaid(word)
    file = "" if word.file == "config.json" or word.type else f" in `{word.file}`"
    said = f"`{word.key}`{file}"
    if word.words and any(name != value for name, value in word.words.items()):
        said += ": " + ", ".join(f"`{name}` for {_value(value)}" for name, value in word.words.items())
    if word.begins:
        said += f", which begins with `{word.begins}`"
    if word.form:
        said += f", as pairs of {word.form}"
    if word.default != fact.default:
        said += f"; default: {_value(word.default)}"
    return said + (f". {_sentence(word.note)}" if word.note else "")


def _unsaid(word: Word) -> str:
    values = [value for value in word.unsaid if value is not None]
    said = f"no key, always {' or '.join(map(_value, values))}" if values else "no key, always unset"
    return said + (f": {word.why}" if word.why else "")


def _keys(what: str, table: KeyTable) -> str:
    lines = [f"### {_sentence(what).removesuffix('.')}", ""]
    lines += _lines((KIND[kind], [k for k, of in table.kinds.items() if of == kind]) for kind in KIND)
    reasons = dict.fromkeys(table.harmless.values())
    lines += _lines((f"no effect ({why})", [k for k, of in table.harmless.items() if of == why]) for why in reasons)
    return "\n".join(lines) + "\n"


def _lines(groups: Any) -> Iterator[str]:
    for label, keys in groups:
        if keys:
            listed = ", ".join(f"`{key}`" for key in keys)
            yield from textwrap.wrap(
                f"- {_sentence(label).removesuffix('.')}: {listed}.",
                width=120,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
