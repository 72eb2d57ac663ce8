"""Base models that are on this machine: their configs and tokenizers, without asking the network."""

from __future__ import annotations

from typing import Any

from .conversations import Encoder, template_of
from .recipe import Recipe


def local_config(name: str, *, vision: bool = False) -> Any:
    """The config of a base model that is on this machine; None where it is not."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return getattr(config, "vision_config", config) if vision else config


def local_encoder(recipe: Recipe) -> Encoder | None:
    """What makes tokens of a recipe's rows, where its base models are on this machine."""
    from transformers import AutoTokenizer

    vision = local_config(recipe.model.visual_encoder, vision=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.llm, local_files_only=True)
    except (OSError, ValueError):
        return None
    if vision is None:
        return None
    image_tokens = (vision.image_size // vision.patch_size) ** 2
    return Encoder(tokenizer, template_of(recipe.data.prompt_template), recipe.data.max_length - image_tokens)
