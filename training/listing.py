"""The recipes that come with the package, a few words each; nothing heavy is imported for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .recipe import load_recipe, recipe_names
from .sizes import KNOWN, sizes_of


def listing() -> list[dict[str, str]]:
    """The recipes that come with the package: what each trains, on what, and in how much memory."""
    found = []
    for name in recipe_names():
        stages = load_recipe(name)
        last = stages[-1]
        model = last.model
        trained = [_trained("llm", model.freeze_llm, model.llm_lora)]
        trained.append(_trained("tower", model.freeze_visual_encoder, model.visual_encoder_lora))
        what = ", ".join(["projector", *(word for word in trained if word)])
        known = {model.llm, model.visual_encoder} <= set(KNOWN)
        size = sizes_of(model, KNOWN) if known else None
        found.append(
            {
                "name": name,
                "stage": "1 and 2" if len(stages) > 1 else "2" if model.pretrained else "1",
                "trains": what,
                "model": f"{Path(model.llm).name}{' in 4 bits' if model.quantization else ''} + "
                f"{Path(model.visual_encoder).name}",
                "data": "made by itself" if last.build else ", ".join(one.name for one in last.data.sets),
                "memory": f"{(size.weights + size.optimizer) / 1e9:.0f} GB"
                if size
                else "small"
                if last.build
                else "memory unknown",
            }
        )
    return found


def _trained(part: str, frozen: bool, lora: Any) -> str:
    return f"{part} by LoRA" if lora is not None else "" if frozen else part
