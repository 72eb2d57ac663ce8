"""Architecture tables: the tensors that they list are those of the real classes, and no config can harm them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import InputError
from llava_convert.model.configs import named_config
from llava_convert.model.tables.families import MOST_LAYERS, architecture_for, architectures, parse_architecture
from llava_convert.model.tables.patterns import TableError

LLM, VISION = "language_model", "vision_tower"
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PHI3 = {**SIZES, "pad_token_id": 0}
TOWER: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 28, "patch_size": 14}
Shapes = dict[str, tuple[int, ...]]


def expected(part: str, config: Mapping[str, Any]) -> Shapes:
    found = named_config(config, part, where="test")
    table = architecture_for(part, found["model_type"])
    return {name.removeprefix(f"{part}."): want.shape for name, want in table.tensors(found).items()}


def real(model_type: str, sizes: Mapping[str, Any]) -> Shapes:
    """Names and shapes of transformers' own class, made without memory; the tower's in the names of 4.x."""
    import torch
    from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM
    from transformers.models.mistral import MistralConfig, MistralForCausalLM
    from transformers.models.phi3 import Phi3Config, Phi3ForCausalLM
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel

    classes: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    }
    config_class, model_class = classes[model_type]
    with torch.device("meta"):
        state = model_class(config_class(**sizes)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "vision" in model_type:
        shapes = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in shapes.items()}
    return shapes


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", SIZES),
        ("llama", SIZES | {"num_key_value_heads": 2}),
        ("llama", SIZES | {"attention_bias": True}),
        ("llama", SIZES | {"mlp_bias": True, "num_key_value_heads": 1}),
        ("llama", SIZES | {"head_dim": 6, "num_key_value_heads": 2}),
        ("llama", SIZES | {"tie_word_embeddings": True}),
        ("mistral", SIZES | {"num_key_value_heads": 2}),
        ("mistral", SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
        ("qwen2", SIZES | {"num_key_value_heads": 2}),
        ("qwen2", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("phi3", PHI3),
        ("phi3", PHI3 | {"num_key_value_heads": 2}),
        ("clip_vision_model", TOWER),
        ("clip_vision_model", TOWER | {"image_size": 30, "num_channels": 1}),
        ("siglip_vision_model", TOWER),
        ("siglip_vision_model", TOWER | {"vision_use_head": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sorted(set(value) - set(SIZES))),
)
def test_against_transformers(model_type: str, sizes: dict[str, Any]) -> None:
    """Names and shapes are those of state_dict(); tied weights are listed there too."""
    part = VISION if "vision" in model_type else LLM
    assert expected(part, {"model_type": model_type, **sizes}) == real(model_type, sizes)


def test_module_order_against_transformers() -> None:
    """The order in which tensors are written is that of the class."""
    found = list(expected(LLM, {"model_type": "llama", **SIZES}))
    assert found == list(real("llama", SIZES))


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "phi3", "clip_vision_model", "siglip_vision_model"]
)
def test_defaults_against_transformers(model_type: str) -> None:
    """A published config leaves out what equals its class's default: our default must be the same.

    Keys that 5.x no longer has at the top (rope_theta), or never had for the class, are harmless where the class
    ignores them.
    """
    from transformers.models.clip import CLIPVisionConfig
    from transformers.models.llama import LlamaConfig
    from transformers.models.mistral import MistralConfig
    from transformers.models.phi3 import Phi3Config
    from transformers.models.qwen2 import Qwen2Config
    from transformers.models.siglip import SiglipVisionConfig

    classes = (LlamaConfig, MistralConfig, Qwen2Config, Phi3Config, CLIPVisionConfig, SiglipVisionConfig)
    theirs = next(c for c in classes if c.model_type == model_type)().to_dict()
    part = VISION if "vision" in model_type else LLM
    ours = named_config({"model_type": model_type}, part, where="test")
    assert {k: v for k, v in ours.items() if k in theirs and theirs[k] != v} == {}
    assert expected(part, {"model_type": model_type}) == real(model_type, {})


def test_the_vocabulary_is_tied_only_where_the_config_says_so() -> None:
    table = architecture_for(LLM, "llama")
    head = "language_model.lm_head.weight"
    tied = table.tensors(table.complete({**SIZES, "tie_word_embeddings": True}))
    assert tied[head].tied == "language_model.model.embed_tokens.weight"
    assert table.tensors(table.complete(SIZES))[head].tied is None
    assert "lm_head" in table.path.read_text(encoding="utf-8").splitlines()[tied[head].line - 1]


@pytest.mark.parametrize(("steps", "bias", "names"), [(0, True, 2), (1, True, 4), (1, False, 2), (3, True, 8)])
def test_projector_of_every_depth(steps: int, bias: bool, names: int) -> None:
    table = architecture_for("projector", "projector")
    config = {"text_hidden_size": 8, "vision_hidden_size": 4, "steps": steps, "bias": bias}
    found = table.tensors(config)
    assert len(found) == names
    assert found["projector.0.weight"].shape == (8, 4)
    assert [n for n in found if n.endswith("weight")] == [f"projector.{2 * i}.weight" for i in range(steps + 1)]
    assert all(want.shape == (8, 8) for n, want in found.items() if n.endswith("weight") and n != "projector.0.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "does not divide evenly"),
        ({"num_attention_heads": 0}, "does not divide evenly"),
        ({"num_hidden_layers": MOST_LAYERS + 1}, "more than any model has"),
        ({"num_hidden_layers": 2**31}, "more than any model has"),
        ({"num_hidden_layers": -1}, "should be a count"),
        ({"num_hidden_layers": True}, "should be a count"),
        ({"num_hidden_layers": "2"}, "should be a count"),
        ({"num_hidden_layers": 2.0}, "should be a count"),
        ({"hidden_size": [16]}, "should be a count"),
        ({"hidden_size": 2**80}, "should be a count"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"vocab_size": {"a": 1}}, "should be a count"),
    ],
)
def test_hostile_text_configs(config: dict[str, Any], message: str) -> None:
    start = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        expected(LLM, {"model_type": "llama", **SIZES, **config})
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "config", [{"patch_size": 0}, {"image_size": -1}, {"patch_size": "14"}, {"num_channels": True}]
)
def test_hostile_vision_configs(config: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        expected(VISION, {"model_type": "clip_vision_model", **TOWER, **config})


def test_the_most_layers_are_still_quick() -> None:
    start = time.process_time()
    found = expected(LLM, {"model_type": "llama", **SIZES, "num_hidden_layers": MOST_LAYERS})
    assert len(found) == 9 * MOST_LAYERS + 3
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", sorted(architectures()))
def test_shipped_tables(name: str) -> None:
    table = architectures()[name]
    assert table.path.stem in (name, "projector")
    lines = table.path.read_text(encoding="utf-8").splitlines()
    sizes = {**SIZES, **TOWER, "text_hidden_size": 8, "vision_hidden_size": 4, "steps": 2, "bias": True}
    for canonical, want in table.tensors(table.complete(sizes)).items():
        assert canonical.startswith(f"{table.part}.")
        assert want.line and "shape" in lines[want.line - 1]
        assert want.shape and all(size > 0 for size in want.shape)
        assert table.dropped(canonical) is None, "a tensor that the model has would be left behind"


def test_old_buffers_are_dropped_with_a_reason() -> None:
    llama, clip = architectures()["llama"], architectures()["clip"]
    for canonical in ("language_model.model.layers.7.self_attn.rotary_emb.inv_freq",):
        assert "computes from its config" in (llama.dropped(canonical) or "")
    assert clip.dropped("vision_tower.vision_model.embeddings.position_ids") is not None
    assert clip.dropped("vision_tower.vision_model.embeddings.class_embedding") is None


def test_formulas_run_left_to_right() -> None:
    text = """
architecture = "x"
part = "vision_tower"
model_types = ["x"]
tensor = [
  { name = "a", shape = ["first", "2 * b"], when = "not quiet" },
]
[symbols]
first = ["absent / b", "b + b * b", "b"]
"""
    table = parse_architecture(text, Path("x.toml"))
    assert table.tensors({"b": 3})["vision_tower.a"].shape == (18, 6)
    assert table.tensors({"b": 3, "quiet": True}) == {}


def test_roles_are_those_that_the_table_names() -> None:
    for name in ("llama", "mistral", "phi3", "qwen2"):
        table = architectures()[name]
        assert (table.embedding, table.head) == (f"{LLM}.model.embed_tokens.weight", f"{LLM}.lm_head.weight")
    text = """
architecture = "x"
part = "language_model"
model_types = ["x"]
embedding = "model.words.weight"
head = "out.weight"
tensor = [
  { name = "model.words.weight", shape = ["vocab_size"] },
  { name = "model.blocks.{layer}.up.weight", shape = ["vocab_size"] },
  { name = "out.weight", shape = ["vocab_size"] },
]
[repeat.layer]
count = "num_hidden_layers"
"""
    table = parse_architecture(text, Path("x.toml"))
    assert table.modules == ("model.words", "model.blocks", "out")
    tied = table.tensors({"vocab_size": 3, "num_hidden_layers": 1, "tie_word_embeddings": True})
    assert {name: want.tied for name, want in tied.items() if want.tied} == {
        "language_model.out.weight": "language_model.model.words.weight"
    }
    for role in ("embedding", "head"):
        with pytest.raises(TableError, match=f"no tensor is the {role}"):
            parse_architecture(text.replace(f'{role} = "', f'{role} = "no.'), Path("x.toml"))
