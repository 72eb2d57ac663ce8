"""Whether the metadata of two GGUF files says the same: hyperparameters, vocabulary, template, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.assets.prompts import same_template
from llava_convert.core.later import numpy as np
from llava_convert.layouts.gguf.mmproj import FEATURE_LAYER
from llava_convert.layouts.gguf.names import CLIP, GgufTable, Key, tables
from llava_convert.layouts.gguf.vocabulary import CONTROL, ENDS
from llava_convert.model.checkpoint import VISION, Checkpoint
from llava_convert.model.judgement import Judgement, alike
from llava_convert.model.tables.facts import key_table
from llava_convert.model.target import Target
from llava_convert.storage.gguf.file import Typed

Metadata = Mapping[str, Typed]
_SAMPLING, _ARCH = "general.sampling.", "general.architecture"
_LONG = 16  # values of a list that is not told whole
_TOKENS, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
_STOPS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# What the runtime takes where a file lacks the entry (src/llama-vocab.cpp, llama_vocab::impl::load; clip.cpp).
_DEFAULTS: dict[str, Any] = {
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "clip.use_gelu": False,
    "clip.use_silu": False,
    "clip.has_llava_projector": True,
    "clip.projector_type": "mlp",
    "clip.vision.projector_type": "mlp",
}
# The width of the projector, which its tensors tell; writers disagree on which width it is.
_TOLD_BY_TENSORS = ("clip.vision.projection_dim",)


def compare_stated(found: Judgement, target: Target, theirs: Checkpoint) -> None:
    """Hold the metadata of OUT's files against what a conversion would write."""
    for part, metadata in theirs.stated.items():
        tower = part == VISION
        wanted = next(
            (s.metadata for s in target.sets if (_ARCH in s.metadata and s.metadata[_ARCH].value == CLIP) == tower),
            None,
        )
        if wanted is not None:
            compare_metadata(found, wanted, metadata)


def compare_metadata(found: Judgement, mine: Metadata, theirs: Metadata) -> None:
    """Add what differs to `found`. Entries that decide nothing are named as harmless."""
    table, harmless = _table(mine), key_table("gguf")
    if _TOKENS in mine and _TOKENS in theirs:
        found.compare("stop ids", sorted(_stops(mine)), sorted(_stops(theirs)))
    for name in sorted(mine.keys() | theirs.keys()):
        if name in _STOPS or name == FEATURE_LAYER:  # compared as stop ids, and as a fact
            continue
        one, other = _value(table, mine, name), _value(table, theirs, name)
        reason = None if name.startswith(_SAMPLING) else harmless.reason(name)
        if _alike(one, other) or (name == _TEMPLATE and same_template(one, other)):
            if reason is None:
                found.agree(name, *map(_counted, (one, other)))
        elif reason is not None:
            found.harmless[name] = reason
        elif name not in _TOLD_BY_TENSORS or name in theirs:
            found.differ(name, *_shown(one, other))


def _stops(metadata: Metadata) -> set[int]:
    """Every id at which llama.cpp ends an answer: those that are named, and tokens of known texts."""
    named = {typed.value for name in _STOPS if (typed := metadata.get(name)) is not None}
    types = metadata.get("tokenizer.ggml.token_type")
    tokens = metadata[_TOKENS].value
    kinds = types.value if types is not None else [CONTROL] * len(tokens)
    return named | {
        i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL and text in ENDS
    }


def _table(metadata: Metadata) -> GgufTable | None:
    architecture = metadata[_ARCH].value
    return next((t for t in tables() if t.architecture == architecture and t.families != ("projector",)), None)


def _value(table: GgufTable | None, metadata: Metadata, name: str) -> Any:
    """What an entry says, or what its readers take where it is absent."""
    typed = metadata.get(name)
    if typed is not None:
        return typed.value
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    key = next((key for key in table.keys if key.key == name), None) if table is not None else None
    return None if key is None else _default(table, metadata, key)


def _default(table: GgufTable | None, metadata: Metadata, key: Key) -> Any:
    """A default that is another entry's value, or one that follows from the sizes."""
    if key.symbol == "head_dim" and table is not None:
        width, heads = (
            metadata.get(f"{table.architecture}.{name}") for name in ("embedding_length", "attention.head_count")
        )
        return width.value // heads.value if width is not None and heads is not None and heads.value else None
    if isinstance(key.default, str) and table is not None:
        other = next((one for one in table.keys if one.config == key.default), None)
        return None if other is None else getattr(metadata.get(other.key), "value", None)
    return key.default


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and (list(one) == list(other) or all(map(_alike, one, other)))
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and np.float32(one) == np.float32(other)
    return alike(one, other)


def _counted(value: Any) -> Any:
    """A value; of a long list how many it has."""
    return f"{len(value)} values" if isinstance(value, list | tuple) and len(value) >= _LONG else value


def _shown(one: Any, other: Any) -> tuple[Any, Any]:
    """Both values; of lists only the first place at which they differ."""
    if not (isinstance(one, list | tuple) and isinstance(other, list | tuple)) or max(len(one), len(other)) < _LONG:
        return one, other
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if not _alike(a, b)), min(len(one), len(other))
    )
    return {f"[{at}]": one[at] if at < len(one) else None}, {f"[{at}]": other[at] if at < len(other) else None}
