"""docs/families.md out of the tables: `python -m tests.docs.families_page` writes it."""

from __future__ import annotations

from pathlib import Path

from llava_convert.layouts.gguf import mixes
from llava_convert.layouts.gguf.names import family_name
from llava_convert.layouts.hf.alone import DIALECTS
from llava_convert.model.checkpoint import LLM, VISION
from llava_convert.model.tables.facts import facts
from llava_convert.model.tables.families import Architecture, architectures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = """\
# Which models are supported?

The families and layouts that this version converts. A family that is missing can be [added](adding-a-family.md).
`make docs` writes this page from the tables in `mappings`.

## Language models

The columns are the class in transformers (`hf`), the class in the LLaVA code (`official`) and the architecture in
llama.cpp (`gguf`). "As llama": the same bytes are written under Llama's names, and the model computes the same.
"Exit 4": not supported there. In `xtuner` every family keeps its own names. `--as` lists families that the model can
be written as.

| family | model_type | `hf` | `official` | `gguf` | `--as` |
|---|---|---|---|---|---|
"""
TOWERS = """
## Vision towers

Any size works: the config gives the shapes. Other towers (DINOv2, EVA, Pixtral, InternViT) are refused with exit 4.

| family | model_type | `hf` | `gguf` | features |
|---|---|---|---|---|
"""
KINDS = """
## Kinds of LLaVA

| picture | `hf` | `xtuner` | `gguf` |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    tables = list(architectures().values())
    lines = [_language_model(table) for table in tables if table.part == LLM]
    towers = [_tower(table) for table in tables if table.part == VISION]
    kinds = [_kind(kind, dialect) for kind, dialect in DIALECTS.items()]
    types = ", ".join(f"`{name}`" for name in mixes.OUTTYPES)
    return "\n".join([HEAD + "\n".join(lines), TOWERS + "\n".join(towers), KINDS + "\n".join(kinds), _types(types)])


def _types(types: str) -> str:
    return f"\n## GGUF types\n\n{types}.\n"


def _language_model(table: Architecture) -> str:
    own = table.model_types[0]
    hf = f"as {table.written_as['hf']}" if "hf" in table.written_as else f"`{table.kind}`"
    code = table.official.removeprefix("llava_").capitalize()
    official = f"`Llava{code}ForCausalLM`" if table.official else "exit 4"
    known = family_name(own)
    gguf = f"as {table.written_as['gguf']}" if "gguf" in table.written_as else f"`{known}`" if known else "exit 4"
    others = [n for n, a in architectures().items() if table.name in a.sections.get("as", {})]
    ways = [*table.sections.get("as", {}), *others]
    return f"| {table.name} | `{own}` | {hf} | {official} | {gguf} | {', '.join(f'`{w}`' for w in ways)} |"


def _tower(table: Architecture) -> str:
    features = "all except the class token" if table.class_token else "every patch; xtuner drops the first"
    own = table.model_types[0]
    return f"| {table.name} | `{own}` | `{table.kind}` | `{family_name(own)}` | {features} |"


def _kind(kind: str, dialect: str) -> str:
    aspect = facts()["picture.aspect_ratio"].layouts
    word = aspect[dialect]
    seen = word.means or (f"{word.begins}N" if word.begins else " or ".join(map(str, word.unsaid)))
    able = {name: aspect[name].can_state(word.means or f"{word.begins}9" if word.begins or word.means else "pad")
            for name in ("xtuner", "gguf")}  # fmt: skip
    return f"| `{seen}` | `{kind}` | {' | '.join('yes' if able[name] else 'exit 4' for name in able)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
