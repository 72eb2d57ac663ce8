"""Random LLaVAs whose widths and options decide what a GGUF file holds; written as xtuner leaves a training.

K-quants need rows of a multiple of 256, which tiny models have not; the others here are what a family, a width, a tied
head, a scaled rope or a head size of its own changes. Nothing here goes through the package.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tests.interop.made_tokenizers import MADE
from tests.peers import llama3_tokenizer
from tests.peers.llama3_tokenizer import BEGIN, END_OF_TEXT, END_OF_TURN

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
TOWER = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 3}
PATCH, IMAGE = 14, 56
IMAGE_ROWS = (IMAGE // PATCH) ** 2
# What a layer adds to its input comes from these.
RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
CONFIG = """
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

prompt_template = PROMPT_TEMPLATE.{template}
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path='llm', padding_side='right')
image_processor = dict(type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path='vit')
model = dict(
    type=LLaVAModel,
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='llm'),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path='vit'))
"""


LLAMAS = ("input_layernorm", "post_attention_layernorm")
_FEEDFORWARD = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK = ("self_attn.q_norm", "self_attn.k_norm")
# The norms of a layer, of families that have others than Llama's two.
NORMS: dict[str, tuple[str, ...]] = {
    "gemma2": (*_FEEDFORWARD, *LLAMAS),
    "gemma3_text": (*_FEEDFORWARD, *_QK, *LLAMAS),
    "qwen3": (*_QK, *LLAMAS),
    "olmo2": (*_QK, "post_attention_layernorm", "post_feedforward_layernorm"),
}
OVER_ALL_HEADS = ("olmo2",)  # whose norms of q and k are not of one head


@dataclass(frozen=True)
class Wide:
    """One LLM. `layers` decides which of them a mix gives more bits; `rows` are those of the embedding.

    `settings` are what its config says beyond sizes. `tokenizer` is the fixtures' own (`tiny`), one that is made
    (made_tokenizers.py), or one from a file that was published: `llama-3` (tiktoken), `mistral` (SentencePiece, as
    Llama-2's: byte fallback, a space put in front).
    """

    family: str = "llama"
    hidden: int = 256
    mlp: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    rows: int = 512
    tied: bool = False
    head_dim: int | None = None
    rope: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "tiny"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """transformers' names and shapes, in module order."""
        h = self.hidden
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.rows, h)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name, (rows, columns) in self._projections().items():
                shapes[f"{at}.{name}.weight"] = (rows, columns)
                if self._has_bias(name):
                    shapes[f"{at}.{name}.bias"] = (rows,)
            for norm in NORMS.get(self.family, LLAMAS):
                shapes |= {f"{at}.{norm}.{end}": (self._norm_width(norm),) for end in self._norm}
        shapes |= {f"model.norm.{end}": (h,) for end in self._norm}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.rows, h)}

    def _norm_width(self, norm: str) -> int:
        """Of q and k it is a head's, or that of all heads."""
        heads = {"self_attn.q_norm": self.heads, "self_attn.k_norm": self.kv_heads}.get(norm)
        if heads is None:
            return self.hidden
        return (self.head_dim or self.hidden // self.heads) * (heads if self.family in OVER_ALL_HEADS else 1)

    @property
    def _norm(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.family == "stablelm" else ("weight",)

    def _projections(self) -> dict[str, tuple[int, int]]:
        h, mlp = self.hidden, self.mlp
        size = self.head_dim or h // self.heads
        q, kv = self.heads * size, self.kv_heads * size
        if self.family == "phi3":
            attention, gate = {"self_attn.qkv_proj": (q + 2 * kv, h)}, {"mlp.gate_up_proj": (2 * mlp, h)}
        else:
            attention = {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
            gate = {"mlp.gate_proj": (mlp, h), "mlp.up_proj": (mlp, h)}
        return attention | {"self_attn.o_proj": (h, q)} | gate | {"mlp.down_proj": (h, mlp)}

    def _has_bias(self, name: str) -> bool:
        if name.startswith("mlp"):
            return bool(self.settings.get("mlp_bias"))
        return bool(self.settings.get("attention_bias")) or (
            (self.family == "qwen2" or bool(self.settings.get("use_qkv_bias"))) and not name.endswith("o_proj")
        )


def _longrope(half: int) -> dict[str, Any]:
    """Phi-3's: a factor for each frequency, for short texts and for long ones."""
    long = [1.0 + 0.37 * i for i in range(half)]
    return {"type": "longrope", "short_factor": [1.0 + 0.05 * i for i in range(half)], "long_factor": long}


# The runtime's smallest memory is of 256 tokens; it takes the long factors for any text where it is larger than this.
LONG = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
WIDES: dict[str, Wide] = {
    "wide": Wide(),
    "tied": Wide(tied=True, layers=5),
    "scaled-rope": Wide(layers=3, rope=LLAMA3_ROPE),
    # No multiple of 256, so that K-quants give way to types of 32; 16 layers, so that every rule of a mix is met.
    "narrow": Wide(hidden=96, mlp=288, layers=16, heads=6, kv_heads=3),
    # Heads wider than hidden / heads, as Mistral-Nemo has them.
    "own-head-size": Wide(hidden=256, layers=3, heads=4, kv_heads=4, head_dim=128),
    # Llama-3's own vocabulary in its rows.
    "llama-3": Wide(hidden=64, mlp=128, layers=2, heads=4, kv_heads=2, rows=128256, tokenizer="llama-3"),
    "sentencepiece": Wide(hidden=64, mlp=128, layers=2, heads=4, kv_heads=4, rows=32000, tokenizer="mistral"),
    # Biases everywhere, of which those of q and k move with the rows.
    "biased": Wide(layers=3, settings={"attention_bias": True, "mlp_bias": True}),
    "linear-rope": Wide(layers=3, rope={"type": "linear", "factor": 2.5}),
    "yarn-rope": Wide(layers=3, rope=YARN),
    "yarn-attention": Wide(layers=3, rope={**YARN, "attention_factor": 1.3}),
    # Llama-2 and Vicuna; rows padded, as after a training which adds <pad>.
    "llama-2": Wide(layers=3, rows=819, tokenizer="llama-2"),
    "llama-2-json": Wide(layers=2, rows=832, tokenizer="llama-2-json"),
    "once": Wide("mistral", layers=2, rows=832, settings={"sliding_window": None}, tokenizer="once"),
    "vicuna": Wide(layers=3, rows=896, tokenizer="vicuna"),
    "smollm": Wide(layers=3, rows=605, tied=True, tokenizer="smollm"),
    "mistral": Wide("mistral", layers=3, rows=819, settings={"sliding_window": None}, tokenizer="llama-2"),
    "mistral-window": Wide("mistral", layers=3, rows=819, settings={"sliding_window": 128}, tokenizer="llama-2"),
    # Rows beyond the ids, as in every Qwen2.
    "qwen2": Wide("qwen2", layers=4, rows=704, tokenizer="qwen2"),
    "qwen2-tied": Wide("qwen2", layers=3, heads=4, kv_heads=2, rows=704, tied=True, tokenizer="qwen2"),
    "qwen2-yarn": Wide("qwen2", layers=3, rows=704, rope=YARN, tokenizer="qwen2"),
    # Norms of the heads, whose size is their own.
    "qwen3": Wide("qwen3", layers=4, heads=4, kv_heads=1, head_dim=32, rows=704, tokenizer="qwen2"),
    "qwen3-tied": Wide("qwen3", layers=2, heads=4, kv_heads=2, head_dim=128, rows=704, tied=True, tokenizer="qwen2"),
    # Depths and shares of heads that mixes know: of Vicuna-13B, and of Llama-3-70B.
    "vicuna-13b": Wide(mlp=256, layers=40, kv_heads=8, rows=896, tokenizer="vicuna"),
    "llama-3-70b": Wide(mlp=256, layers=80, heads=8, kv_heads=1),
    "gemma2": Wide(
        "gemma2",
        hidden=64,
        mlp=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        rows=819,
        tied=True,
        tokenizer="llama-2",
        settings={
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Wide(
        "gemma3_text",
        hidden=64,
        mlp=128,
        layers=7,
        heads=4,
        kv_heads=1,
        head_dim=32,
        rows=819,
        tied=True,
        tokenizer="llama-2",
        settings={
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
    ),
    "granite": Wide(
        "granite",
        layers=3,
        rows=819,
        tokenizer="llama-2",
        settings={
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": Wide("olmo2", layers=3, rows=704, tokenizer="qwen2"),
    "stablelm": Wide(
        "stablelm",
        layers=3,
        rows=704,
        tokenizer="qwen2",
        settings={"use_qkv_bias": True, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    ),
    # Phi-3-mini, whose keys are not shared, and Phi-3-medium.
    "phi-3": Wide("phi3", kv_heads=8, rows=832, settings={"sliding_window": 255}, tokenizer="phi-3"),
    "phi-3-shared": Wide("phi3", layers=3, rows=832, settings={"sliding_window": None}, tokenizer="phi-3"),
    "phi-3-long": Wide(
        "phi3",
        layers=3,
        rows=832,
        rope=_longrope(16),
        settings={**LONG, "sliding_window": 1024},
        tokenizer="phi-3-json",
    ),
    # Phi-4-mini: three quarters of a head are rotated, the head is tied, the tokenizer is byte-level.
    "phi-4": Wide(
        "phi3",
        layers=3,
        rows=640,
        tied=True,
        rope=_longrope(12),
        settings={**LONG, "partial_rotary_factor": 0.75, "sliding_window": None},
        tokenizer="phi-4",
    ),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
PUBLISHED = ("llama-3", "mistral")
SPM_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}


def _random(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype, *, plus_one: bool = False
) -> OrderedDict[str, torch.Tensor]:
    """Weights of a model that is no chaos: logits and rows of a picture have a standard deviation of about one, and
    every layer adds a part of what is there, so that a rounding is not blown up from layer to layer. Norms are not one
    and biases not zero, since a swapped pair would then go unseen. `plus_one`: norms multiply by 1 + weight (Gemma).
    """
    generator = torch.Generator().manual_seed(seed)
    made: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = values * 0.1 + ("norm" in name and name.endswith("weight") and not plus_one)
        elif "embed_tokens" in name:
            values *= shape[1] ** -0.5
        else:
            gain = 0.1 if name.endswith(RESIDUAL) else 1.0
            values *= gain * torch.tensor(shape[1:]).prod() ** -0.5
        made[name] = values.to(dtype)
    return made


def _tower_shapes() -> dict[str, tuple[int, ...]]:
    h, mlp = TOWER["hidden_size"], TOWER["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (h,),
        "vision_model.embeddings.patch_embedding.weight": (h, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": (IMAGE_ROWS + 1, h),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{norm}.{kind}": (h,) for kind in ("weight", "bias")}
    for layer in range(TOWER["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (h, h), f"{at}.self_attn.{name}.bias": (h,)}
        shapes |= {f"{at}.mlp.fc1.weight": (mlp, h), f"{at}.mlp.fc1.bias": (mlp,)}
        shapes |= {f"{at}.mlp.fc2.weight": (h, mlp), f"{at}.mlp.fc2.bias": (h,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.{kind}": (h,) for kind in ("weight", "bias")}
    return shapes


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def published_file(wide: Wide, venvs: Path) -> Path | None:
    """The file that a model's tokenizer is made from, or None: it needs none, or `models` is not built."""
    if wide.tokenizer not in PUBLISHED:
        return None
    if wide.tokenizer == "mistral":
        return next(venvs.glob("models/lib/python*/site-packages/mistral_common/data/tokenizer.model.v1"), None)
    return llama3_tokenizer.ranks_file(venvs)


def _write_tokenizer(wide: Wide, folder: Path, tiny: Path, published: Path | None) -> tuple[int | None, list[int]]:
    """Write the tokenizer's files; returns BOS and the ids that end a text or a turn."""
    if wide.tokenizer in MADE:
        return MADE[wide.tokenizer].write(folder)
    if wide.tokenizer == "mistral":
        assert published is not None
        shutil.copy(published, folder / "tokenizer.model")
        _write_json(folder / "tokenizer_config.json", SPM_CONFIG)
        return 1, [2]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny / name, folder / name)
    if wide.tokenizer == "llama-3":
        assert published is not None
        llama3_tokenizer.read(published).save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        _write_json(folder / "tokenizer_config.json", settings | {"added_tokens_decoder": {}})
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
    return ids(BEGIN), [ids(END_OF_TEXT), ids(END_OF_TURN)]


def _write_llm(wide: Wide, folder: Path, tiny: Path, published: Path | None) -> None:
    folder.mkdir(parents=True)
    begin, stops = _write_tokenizer(wide, folder, tiny, published)
    config: dict[str, Any] = {
        "architectures": [CLASSES[wide.family]],
        "model_type": wide.family,
        "hidden_size": wide.hidden,
        "intermediate_size": wide.mlp,
        "num_attention_heads": wide.heads,
        "num_key_value_heads": wide.kv_heads,
        "num_hidden_layers": wide.layers,
        "vocab_size": wide.rows,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": wide.rope,
        "tie_word_embeddings": wide.tied,
        "bos_token_id": begin,
        "eos_token_id": stops[0],
        "torch_dtype": "bfloat16",
        **wide.settings,
    }
    if wide.head_dim is not None:
        config["head_dim"] = wide.head_dim
    if wide.family == "phi3":
        config["pad_token_id"] = stops[0]  # its class takes 32000 else
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": begin, "eos_token_id": stops})


def _template(wide: Wide) -> str:
    if wide.tokenizer in MADE:
        return MADE[wide.tokenizer].template
    return "vicuna" if wide.tokenizer == "mistral" else "llama3_chat"


def make_wide(name: str, folder: Path, tiny: Path, published: Path | None = None) -> Path:
    """`folder/{llm,vit}` and `folder/iter_1.pth`, which holds a whole LLM and a projector; returns the last.

    `published` is what `published_file` found, for a model that needs it. LLM weights are bfloat16 values
    in float32, so that bf16, f32 and most of f16 hold them without rounding.
    """
    wide = WIDES[name]
    _write_llm(wide, folder / "llm", tiny / "llm", published)
    tower = folder / "vit"
    tower.mkdir()
    save_file(_random(_tower_shapes(), 3, torch.float32), tower / "model.safetensors", {"format": "pt"})
    vision = json.loads((tiny / "vit" / "config.json").read_text()) | TOWER
    _write_json(tower / "config.json", vision)
    shutil.copy(tiny / "vit" / "preprocessor_config.json", tower)
    gemma = wide.family.startswith("gemma")
    state = OrderedDict(
        (f"llm.{key}", value.float())
        for key, value in _random(wide.shapes(), 1, torch.bfloat16, plus_one=gemma).items()
    )
    width = TOWER["hidden_size"]
    projector = {"0.weight": (wide.hidden, width), "0.bias": (wide.hidden,)}
    projector |= {"2.weight": (wide.hidden, wide.hidden), "2.bias": (wide.hidden,)}
    state |= {f"projector.model.{key}": value for key, value in _random(projector, 2, torch.float32).items()}
    config = CONFIG.format(template=_template(wide))
    torch.save({"meta": {"cfg": config, "epoch": 0, "iter": 1}, "state_dict": state}, folder / "iter_1.pth")
    return folder / "iter_1.pth"
