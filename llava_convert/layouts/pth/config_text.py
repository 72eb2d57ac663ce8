"""The training config that an mmengine checkpoint carries as text (`meta.cfg`), made of what is known of a model.

It names the base models by their ids, and holds what decides how the weights are read: LoRA settings, the layer of the
tower, the prompt template. xtuner 0.1.23 builds a model of it (model/llava.py, `LLaVAModel.__init__`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_convert.assets.bundle import Artefacts
from llava_convert.model.adapter import Adapter
from llava_convert.model.checkpoint import LLM, PART_WORDS, VISION
from llava_convert.model.configs import family
from llava_convert.model.facts import DEPTH, LAYER, value_of

_PLAIN = (str, int, float, bool)


def config_text(made: Artefacts, held: Mapping[str, str], dtype: str | None) -> str:
    """The config of a checkpoint that holds parts as `held` says ("full", "lora", "absent").

    `dtype` is torch's name of what the language model is loaded in, None where the checkpoint does not hold it. Raises
    UnsupportedError (exit 4) for a LoRA whose alpha nobody knows.
    """
    checkpoint, facts = made.model.checkpoint, made.model.facts
    model: dict[str, Any] = {
        "type": "xtuner.model.LLaVAModel",
        "freeze_llm": held[LLM] != "full",
        "freeze_visual_encoder": held[VISION] != "full",
        "visual_select_layer": value_of(facts, LAYER),
        "projector_depth": value_of(facts, DEPTH),
        "pretrained_pth": None,
    }
    if (longest := checkpoint.settings.max_position_embeddings) is not None:
        model["max_position_embeddings"] = longest
    for part, name in ((LLM, "llm"), (VISION, "visual_encoder")):
        adapter = checkpoint.parts[part].adapter
        model[name] = _base(made, part)
        if part == LLM and dtype is not None:
            model[name]["torch_dtype"] = f"torch.{dtype}"
        if held[part] == "lora" and adapter is not None:
            model[f"{name}_lora"] = _lora(made, part, adapter)
    text = f"model = {_spelled(model)}\n"
    template = made.template_name
    if template is not None:
        named = f"xtuner.utils.PROMPT_TEMPLATE.{template}" if isinstance(template, str) else template
        text += f"prompt_template = {_spelled(named)}\n"
    pads = checkpoint.settings.image_aspect_ratio == "pad"
    dataset = {"type": "xtuner.dataset.LLaVADataset", "pad_image_to_square": pads}
    return text + f"llava_dataset = {_spelled(dataset)}\n"


def _base(made: Artefacts, part: str) -> dict[str, Any]:
    """What loads a base model."""
    config = made.model.configs.get(part)
    tower = family(VISION, config).kind if part == VISION and config is not None else "CLIPVisionModel"
    kind = tower if part == VISION else "AutoModelForCausalLM"
    return {"type": f"transformers.{kind}.from_pretrained", "pretrained_model_name_or_path": made.id_of(part)[0]}


def _lora(made: Artefacts, part: str, adapter: Adapter) -> dict[str, Any]:
    settings, first = adapter.settings, next(iter(adapter.modules))
    asked = made.options.lora_alpha.get(PART_WORDS[part])
    adapter.scale(first, alpha=asked)  # refuses an alpha that nobody knows
    alpha = asked if asked is not None or settings is None else settings.lora_alpha
    rank = adapter.modules[first].rank
    found: dict[str, Any] = {"type": "peft.LoraConfig", "r": rank, "lora_alpha": alpha}
    if settings is not None:
        more = {
            "r": settings.r or rank,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            "bias": settings.bias,
            "rank_pattern": dict(settings.rank_pattern),
            "alpha_pattern": dict(settings.alpha_pattern),
            "target_modules": settings.target_modules,
            "modules_to_save": settings.modules_to_save,
        }
        found |= {key: value for key, value in more.items() if value not in (None, False, {}, "none")}
        found |= {key: settings.other[key] for key in ("lora_dropout",) if isinstance(settings.other.get(key), _PLAIN)}
    if part == LLM:
        found["task_type"] = "CAUSAL_LM"
    return found


def _spelled(value: Any, indent: int = 4) -> str:
    """A value as mmengine dumps it: dicts by keywords, one a line."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key.isidentifier() for key in value):
            return repr(dict(value))
        lines = (f"{' ' * indent}{key}={_spelled(inner, indent + 4)}" for key, inner in value.items())
        return "dict(\n" + ",\n".join(lines) + ")" if value else "dict()"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_spelled(inner, indent) for inner in value) + "]"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    return repr(value)
