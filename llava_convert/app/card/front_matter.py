"""The metadata on top of a card, in the hub's words (its guide "Model Cards", and ModelCardData of huggingface_hub)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.origin import Origin
from llava_convert.core.tensors import QUANTS
from llava_convert.model.checkpoint import LLM, PROJECTOR

# Words which YAML takes for something else than a text.
_NOT_TEXT = re.compile(r"(?i)y|n|yes|no|on|off|true|false|null|none|inf|nan")
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)


def front_matter(facts: Facts, origin: Origin) -> str:
    """The block between the dashes, both included."""
    license = origin.license
    fields: dict[str, str | Sequence[str] | None] = {
        "pipeline_tag": facts.card.task,
        "library_name": facts.card.library,
        "license": license.id if license else None,
        "license_name": license.name if license else None,
        "license_link": license.link if license else None,
        "language": origin.languages,
        "base_model": (origin.source,) if origin.source else origin.bases,
        "base_model_relation": relation(facts, origin),
        "datasets": origin.datasets,
        "tags": _tags(facts),
    }
    return "\n".join(["---", *_yaml(fields), "---"])


def relation(facts: Facts, origin: Origin) -> str | None:
    """How the output came of `base_model`: one of the four relations that the hub knows, or nothing.

    A model of a hub in another layout is none of them, unless it is quantised. The language model and the tower were
    trained together, which makes a finetune of both; two base models without a word would be taken for a merge.
    """
    if origin.source:
        return "quantized" if any(t.dtype in QUANTS for t in facts.plan.tensors) else None
    if not origin.bases:
        return None
    adapters = [t for t in facts.plan.tensors if ".lora_" in t.canonical]
    whole = {t.canonical.partition(".")[0] for t in facts.plan.tensors} - {PROJECTOR}
    only = bool(adapters) and whole == {t.canonical.partition(".")[0] for t in adapters}
    return "adapter" if only else "finetune"


def _tags(facts: Facts) -> tuple[str, ...]:
    family = facts.model.configs.get(LLM, {}).get("model_type")
    trained = (facts.source.trainer,) if facts.source.trainer is not None else ()
    seeing = ("multimodal", "vision") if facts.alone != LLM else ()
    known = (family,) if isinstance(family, str) and facts.alone in (None, LLM) else ()
    return tuple(dict.fromkeys(("llava", *seeing, *known, *facts.kind.tags, *trained)))


def _yaml(fields: Mapping[str, str | Sequence[str] | None]) -> list[str]:
    lines: list[str] = []
    for key, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {_scalar(item)}" for item in value)]
    return lines


def _scalar(text: str) -> str:
    """A text as YAML reads it back: as it is where nothing else could be meant, else as a JSON string."""
    plain = _PLAIN.fullmatch(text) and not _NOT_TEXT.fullmatch(text)
    return text if plain else json.dumps(text, ensure_ascii=False)  # YAML reads no surrogate pairs
