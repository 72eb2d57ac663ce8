"""What llama.cpp chokes on in a GGUF, or silently computes wrongly: it checks little of this itself.

Which keys and tensors it needs was found by leaving out each and loading the rest with the real runtime: some end it
with a segmentation fault, a missing bias gives other numbers without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava_convert.layouts.gguf.mmproj import FEATURE_LAYER, Metadata, value
from llava_convert.layouts.gguf.names import GgufTable, missing
from llava_convert.model.tables.names import grouped

_VISION_KEYS = (
    "clip.has_vision_encoder",
    "clip.vision.image_size",
    "clip.vision.patch_size",
    "clip.vision.embedding_length",
    "clip.vision.feed_forward_length",
    "clip.vision.block_count",
    "clip.vision.projection_dim",
    "clip.vision.attention.head_count",
    "clip.vision.attention.layer_norm_epsilon",
    "clip.vision.image_mean",
    "clip.vision.image_std",
)
# The runtime reads two linear layers: it ends with a segmentation fault without the second or a bias.
_PROJECTOR = ("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias")
# Tokens that end a turn where the converters name them in the metadata (Llama-3's, and ChatML's).
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


def llm_defects(metadata: Metadata) -> list[str]:
    """What a language model's file lacks to be talked with: its tokenizer, and where an answer ends."""
    tokens = value(metadata, "tokenizer.ggml.tokens")
    kind = value(metadata, "tokenizer.ggml.model")
    if not tokens or not kind:
        return ["the language model's file holds no tokenizer (tokenizer.ggml.model and .tokens)"]
    said: list[str] = []
    if kind == "gpt2":
        said += [f"the tokenizer lacks tokenizer.ggml.{key}" for key in ("merges", "pre") if not value(
            metadata, f"tokenizer.ggml.{key}"
        )]  # fmt: skip
    elif value(metadata, "tokenizer.ggml.scores") is None:
        said.append("the tokenizer lacks tokenizer.ggml.scores")
    if len(value(metadata, "tokenizer.ggml.token_type", ())) != len(tokens):
        said.append("the tokenizer does not have a type (tokenizer.ggml.token_type) for each token")
    ids = {key: value(metadata, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    said += [
        f"tokenizer.ggml.{key}_token_id is {i}, and there are {len(tokens)} tokens"
        for key, i in ids.items()
        if i is not None and i >= len(tokens)
    ]
    if ids["eos"] is None:
        return [*said, "nothing says where an answer ends (tokenizer.ggml.eos_token_id)"]
    template = str(value(metadata, "tokenizer.chat_template", ""))
    ends = {tokens[i] for key in ("eos", "eot") if (i := ids[key]) is not None and i < len(tokens)}
    for token in _TURN_ENDS:
        if token in template and token not in ends and token in tokens:
            said.append(f"the chat template ends turns with {token}, which is neither the EOS nor the EOT token")
    return said


def vision_defects(metadata: Metadata, tower: GgufTable, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What an mmproj lacks of what the runtime needs: keys, tensors of the tower, the projector; by GGUF names."""
    there = set(names)
    said = [f"the mmproj lacks {key}" for key in _VISION_KEYS if key not in metadata]
    if "clip.projector_type" not in metadata and "clip.vision.projector_type" not in metadata:
        said.append("the mmproj lacks clip.projector_type")
    if FEATURE_LAYER not in metadata:
        said.append(f"the mmproj lacks {FEATURE_LAYER}: llama.cpp then leaves out the tower's last block")
    if not any(name.startswith("mm.") for name in there):
        said.append("the mmproj holds no projector (mm.0, mm.2)")
        lacking = []
    else:
        lacking = [name for name in _PROJECTOR if name not in there]
    lacking += missing(tower, config, tuple(there))
    if lacking:
        said.append(f"the mmproj lacks {len(lacking)} tensors: {grouped(lacking)}")
    return said
