"""What peft's rules make of a LLaVA and an adapter's files, in float64: an account of its own, beside the package's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]


def stored(name: str) -> str:
    """The name under which a LLaVA of transformers keeps a tensor: of its name in memory, of any release or LLaVA."""
    name = name.removeprefix("model.")
    for index, linear in (("0", "linear_1"), ("2", "linear_2")):
        name = name.replace(f"mm_projector.{index}.", f"multi_modal_projector.{linear}.")
    name = name.replace("vision_tower.vision_tower.", "vision_tower.")
    if not name.startswith("language_model.") and name.startswith(("lm_head", "layers.", "embed_tokens", "norm.")):
        name = f"language_model.{name}"
    name = re.sub(r"^language_model\.(layers|embed_tokens|norm)\b", r"language_model.model.\1", name)
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def _setting(config: dict[str, Any], kind: str, module: str) -> float:
    """Rank or alpha of a module, which a pattern may set (peft 0.12's `get_pattern_key`: a suffix after a dot)."""
    patterns = config.get(f"{kind}_pattern") or {}
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    return float(patterns[found] if found is not None else config[{"rank": "r", "alpha": "lora_alpha"}[kind]])


def recipe(base: Tensors, adapter: Path) -> Tensors:
    """All tensors of the merge: each what is exact, rounded once to the base's dtype."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    files = load_file(adapter / "adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model."): value.astype(np.float64) for name, value in files.items()}
    made = dict(base)
    for name, value in trained.items():
        module, _, kind = name.partition(".lora_")
        if kind == "magnitude_vector" or kind.startswith(("B", "embedding_B")):
            continue
        if not kind:  # trained whole: a bias, or a module among modules_to_save
            disk = stored(name.replace(".base_layer.", "."))
            if "token_adapter" not in disk:
                made[disk] = value.astype(base[disk].dtype)
            continue
        disk = f"{stored(module)}.weight"
        weight = base[disk].astype(np.float64)
        rank = _setting(config, "rank", module)
        scale = _setting(config, "alpha", module) / (np.sqrt(rank) if config.get("use_rslora") else rank)
        if kind.startswith("embedding_A"):
            delta = (trained[f"{module}.lora_embedding_B"] @ value).T
        else:
            other = trained[f"{module}.lora_B.weight"]
            delta = (other.reshape(len(other), -1) @ value.reshape(len(value), -1)).reshape(weight.shape)
        exact = weight + scale * delta
        magnitude = trained.get(
            f"{module}.lora_magnitude_vector", trained.get(f"{module}.lora_magnitude_vector.weight")
        )
        if magnitude is not None:
            exact *= magnitude.reshape(-1, 1) / np.linalg.norm(exact, axis=1, keepdims=True)
        made[disk] = exact.astype(base[disk].dtype)
    for name, value in trained.items():
        if "trainable_tokens_delta" in name:
            disk = stored(name.split(".token_adapter")[0].removesuffix(".trainable_tokens_delta")) + ".weight"
            rows = next(iter(config["trainable_token_indices"].values()))
            made[disk] = made[disk].copy()
            made[disk][rows] = value.astype(made[disk].dtype)
    return made
