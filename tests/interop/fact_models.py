"""Tiny LLaVAs of random weights, of which one fact differs from the usual, and what transformers computes of them."""

from __future__ import annotations

import copy
import json
import re
import shutil
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.interop.conftest import Converter

TOKENS = 512  # of the fixtures' tokenizer; rows beyond them are added, and are no tokens of a text
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_scaling": None, "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "max_window_layers": 2},
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 8192,
        "pad_token_id": 513,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 513,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 513, "rope_local_base_freq": 10000.0,
        "num_hidden_layers": 7, "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    },
    "granite": {"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "stablelm": {"architectures": ["StableLmForCausalLM"], "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "use_sliding_window": False},
}  # fmt: skip
_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 576, "hidden_act": "silu", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "bos_token_id": 448, "eos_token_id": 449, "torch_dtype": "float32",
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14, "num_channels": 3, "torch_dtype": "float32",
}  # fmt: skip
_TOWERS: dict[str, dict[str, Any]] = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 32,
    },
    "siglip": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_SMALL = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "generation_config", "preprocessor")


@dataclass(frozen=True)
class Made:
    """What sets a model apart: keys of the config's top, of its language model and of its tower, and their kinds."""

    top: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    tower: str = "clip"


def config_of(made: Made) -> dict[str, Any]:
    """A config.json as releases of 4.x write it."""
    strategy = made.top.get("vision_feature_select_strategy", "default")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 512,
        "image_seq_length": 16 + (made.tower == "clip") - (strategy == "default"),
        "pad_token_id": 513,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": {"model_type": made.family, **_TEXT, **FAMILY[made.family], **made.text},
        "vision_config": {**_TOWER, **_TOWERS[made.tower], **made.vision},
        **made.top,
    }


def fill(model: nn.Module) -> None:
    """Weights by the names of tensors: the same tensor of two models has the same; norms are near one."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            norm = value.dim() == 1 and name.endswith("weight")
            value.copy_(noise * 0.12 + norm)


def write(folder: Path, base: Path, made: Made) -> Path:
    """An hf folder whose small files are those of `base`, in the names of every release.

    Weights are float32, and do not depend on the facts.
    """
    config = config_of(made)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(copy.deepcopy(config)))
    fill(model)
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    classic = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v for k, v in saved.items()}
    save_file(classic, folder / "model.safetensors", {"format": "pt"})
    for file in base.iterdir():
        if file.name.startswith(_SMALL):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ids_of(config: Any, length: int, features: int) -> torch.Tensor:
    """A BOS, a picture, and words: (1, length)."""
    words = torch.randint(256, 440, (length - features - 1,), generator=torch.Generator().manual_seed(11)).tolist()
    return torch.tensor([[448, *[config.image_token_index] * features, *words]])


@torch.inference_mode()
def logits(folder: Path, pixels: torch.Tensor, length: int = 48, features: int = 16) -> torch.Tensor:
    """Logits of this environment's transformers in float32, of every token of a text: (length, TOKENS)."""
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert left == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    ids = ids_of(model.config, length, features)
    found: torch.Tensor = model.eval()(input_ids=ids, pixel_values=pixels).logits[0, :, :TOKENS]
    return found


ALL = ("hf", "xtuner", "official", "gguf")
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# As Phi-3's configs are published, and as transformers 5.x saves them.
LISTS = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
}
LONGROPE = {"rope_scaling": {"type": "longrope", **LISTS}, "original_max_position_embeddings": 64}
LONGROPE_OF_5 = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {
        "rope_type": "longrope",
        **LISTS,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A model of one fact, the layouts that can state it, and how long a text must be to show it."""

    made: Made
    to: tuple[str, ...] = ALL
    length: int = 48
    features: int = 16


def text(**keys: Any) -> Made:
    return Made(text=keys)


CASES = {
    "activation-relu": Case(Made({"projector_hidden_act": "relu"}), ("hf", "xtuner")),
    "activation-tanh": Case(Made({"projector_hidden_act": "gelu_pytorch_tanh"}), ("hf", "xtuner")),
    "no-biases": Case(Made({"multimodal_projector_bias": False}), ("hf", "xtuner")),
    "layer-1": Case(Made({"vision_feature_layer": 1})),
    "layer-3": Case(Made({"vision_feature_layer": 3})),
    "last-layer": Case(Made({"vision_feature_layer": -1})),
    "layer-3-from-the-end": Case(Made({"vision_feature_layer": -3})),
    "every-feature": Case(Made({"vision_feature_select_strategy": "full"}), ("hf", "official"), features=17),
    "rope-theta": Case(text(rope_theta=10000.0)),
    "linear-rope": Case(text(rope_scaling=LINEAR)),
    "llama3-rope": Case(text(rope_scaling=LLAMA3), length=300),
    "yarn-rope": Case(text(rope_scaling=YARN), length=300),
    "longrope": Case(Made(text=LONGROPE, family="phi3"), ("hf", "xtuner", "official"), length=300),
    "longrope-of-5": Case(Made(text=LONGROPE_OF_5, family="phi3"), ("hf", "xtuner", "official"), length=300),
    "activation-of-words": Case(text(hidden_act="gelu"), ("hf", "xtuner", "official")),
    "norm": Case(text(rms_norm_eps=0.25)),
    "norm-of-the-tower": Case(Made(vision={"layer_norm_eps": 0.25})),
    "activation-of-the-tower": Case(Made(vision={"hidden_act": "gelu"})),
    "window-of-qwen2": Case(
        Made(text={"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, family="qwen2"),
        length=120,
    ),
    "window-of-mistral": Case(Made(text={"sliding_window": 32}, family="mistral"), length=120),
}


@dataclass
class Models:
    """Sources by the name of their case, and what became of them; each is made once."""

    converted: Converter
    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        return self._write(name, CASES[name].made)

    def usual(self, name: str) -> Path:
        """The model of the same weights without the fact."""
        made = CASES[name].made
        return self._write(f"usual-{made.family}", replace(Made(), family=made.family))

    def _write(self, name: str, made: Made) -> Path:
        if name not in self.made:
            self.made[name] = write(self.folder / name, self.converted("tiny", "hf"), made)
        return self.made[name]

    def out(self, name: str, to: str) -> Path:
        more = {"outtype": "f32", "mmproj_outtype": "f32"} if to == "gguf" else {"dtype": "float32"}
        return self.converted.onward(self.source(name), to, **more)

    def back(self, name: str, to: str) -> Path:
        """The source in another layout, and back to transformers' (or straight to it)."""
        out = self.out(name, to)
        return out if to == "hf" else self.converted.onward(out, "hf", dtype="float32")
