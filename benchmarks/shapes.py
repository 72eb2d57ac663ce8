"""Models of a wanted size in LLaVA's real proportions: names and shapes, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

Shapes = dict[str, tuple[int, ...]]

LORA_RANK, LORA_ALPHA = 64, 16  # of the ViT, as in xtuner's published configs
_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_TOWER_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A LLaVA-Llama-3 with a CLIP-L tower, smaller by layers and vocabulary only."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    tower_layers: int

    def llm(self) -> Shapes:
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, h)}
        for layer in range(self.layers):
            rows = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
            rows |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (self.mlp, h), "mlp.up_proj": (self.mlp, h)}
            rows |= {"mlp.down_proj": (h, self.mlp)}
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{name}.weight": shape for name, shape in rows.items()}
            shapes |= {f"{prefix}.{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def tower(self) -> Shapes:
        h, mlp = _TOWER["hidden_size"], _TOWER["intermediate_size"]
        shapes: Shapes = {
            "vision_model.embeddings.class_embedding": (h,),
            "vision_model.embeddings.patch_embedding.weight": (h, 3, 14, 14),
            "vision_model.embeddings.position_embedding.weight": (577, h),
        }
        for name in ("pre_layrnorm", "post_layernorm"):
            shapes |= {f"vision_model.{name}.{kind}": (h,) for kind in ("weight", "bias")}
        for layer in range(self.tower_layers):
            prefix = f"vision_model.encoder.layers.{layer}"
            for name in _TOWER_LINEARS:
                rows, columns = {"mlp.fc1": (mlp, h), "mlp.fc2": (h, mlp)}.get(name, (h, h))
                shapes |= {f"{prefix}.{name}.weight": (rows, columns), f"{prefix}.{name}.bias": (rows,)}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{prefix}.{norm}.{kind}": (h,) for kind in ("weight", "bias")}
        return shapes

    def tower_lora(self) -> Iterator[tuple[str, tuple[int, int]]]:
        tower = self.tower()
        for layer in range(self.tower_layers):
            for name in _TOWER_LINEARS:
                module = f"vision_model.encoder.layers.{layer}.{name}"
                rows, columns = tower[f"{module}.weight"]
                yield f"{module}.lora_A.default.weight", (LORA_RANK, columns)
                yield f"{module}.lora_B.default.weight", (rows, LORA_RANK)

    def projector(self) -> Shapes:
        h, v = self.hidden, _TOWER["hidden_size"]
        return {"0.weight": (h, v), "0.bias": (h,), "2.weight": (h, h), "2.bias": (h,)}

    def adapters(self) -> Shapes:
        """What is trained beside the LLM, by xtuner's names: the tower's LoRA and the projector."""
        lora = {f"visual_encoder.base_model.model.{name}": shape for name, shape in self.tower_lora()}
        return lora | {f"projector.model.{name}": shape for name, shape in self.projector().items()}

    def llm_config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": self.vocab - 3,
            "eos_token_id": self.vocab - 2,
            "torch_dtype": dtype,
        }

    def tower_config(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            **_TOWER,
            "num_hidden_layers": self.tower_layers,
            "image_size": 336,
            "patch_size": 14,
            "num_channels": 3,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
            "torch_dtype": "float32",
        }


def bytes_of(shapes: Shapes, itemsize: int) -> int:
    return itemsize * sum(prod(shape) for shape in shapes.values())


LLAVA_8B = Shape(4096, 14336, 32, 8, 32, 128256, 24)
"""LLaVA-Llama-3-8B as published."""


def shape_for(nbytes: int, llm_itemsize: int, tower_itemsize: int) -> Shape:
    """A shape whose LLM, tower and projector together take about `nbytes`.

    Embedding and head take about two fifths, as in small Llamas; the tower grows to CLIP-L's 24 layers at 4 GB.
    """
    tower_layers = min(24, max(3, round(6 * nbytes / 1e9)))
    bare = Shape(2048, 7168, 16, 8, 1, 64, tower_layers)
    rest = nbytes - bytes_of(bare.tower(), tower_itemsize) - bytes_of(bare.projector(), 4)
    layer = bytes_of(bare.llm(), llm_itemsize) - 2 * 64 * 2048 * llm_itemsize
    row = 2 * 2048 * llm_itemsize
    layers = max(1, round(0.6 * rest / layer))
    vocab = min(128256, max(4096, (rest - layers * layer) // row // 64 * 64))
    return Shape(2048, 7168, 16, 8, max(1, round((rest - vocab * row) / layer)), vocab, tower_layers)


def deep_shape_for(nbytes: int, llm_itemsize: int, tower_itemsize: int) -> Shape:
    """A shape that takes about `nbytes` by its layers alone: widths, tower and Llama-2's vocabulary stay.

    What a conversion needs for a tokenizer grows with the vocabulary, so it is the same for all.
    """
    bare = Shape(2048, 7168, 16, 8, 1, 32064, 6)
    llm = bytes_of(bare.llm(), llm_itemsize)
    layer = llm - bytes_of(Shape(2048, 7168, 16, 8, 0, bare.vocab, 6).llm(), llm_itemsize)
    rest = nbytes - bytes_of(bare.tower(), tower_itemsize) - bytes_of(bare.projector(), 4) - (llm - layer)
    return Shape(2048, 7168, 16, 8, max(1, round(rest / layer)), bare.vocab, bare.tower_layers)


def llama3_shape_for(nbytes: int) -> Shape:
    """A shape with Llama-3's vocabulary whose LLM takes about `nbytes` in 16 bits: Llama-3.2-1B's widths with a head of
    its own, or half of them where two tables of 128256 rows would leave no room for layers.
    """
    hidden, mlp, heads = (2048, 8192, 32) if nbytes >= 1.5e9 else (1024, 4096, 16)
    bare = Shape(hidden, mlp, heads, 8, 1, 128256, 1)
    tables = 2 * bare.vocab * hidden * 2
    layer = bytes_of(bare.llm(), 2) - tables
    tower_layers = min(24, max(3, round(6 * nbytes / 1e9)))
    return Shape(hidden, mlp, heads, 8, max(1, round((nbytes - tables) / layer)), bare.vocab, tower_layers)
