"""Towers and language models of families that no table has: refused by their own names, however they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import UnsupportedError
from llava_convert.model.checkpoint import LLM, VISION
from llava_convert.model.tables.families import architectures
from llava_convert.model.tables.patterns import TableError
from llava_convert.model.tables.unknown_families import by_id, by_tensors, parse_unknown_families, unknown_families
from llava_convert.model.towers import towers
from tests.field.conftest import Models, edit

TOWER = "model.vision_tower.vision_tower."
# Names from the families' own code: EVA-CLIP's eva_vit_model.py, InternViT's modeling_intern_vit.py, timm's ConvNeXt,
# segment-anything's image_encoder.py, MoonViT's modeling_moonvit.py; transformers' DINOv2, Pixtral, Swin and ViT.
TOWERS = {
    "an EVA": ["patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.mlp.fc1.weight"],
    "a DINOv2": ["embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.norm1.weight"],
    "a Pixtral": ["patch_conv.weight", "ln_pre.weight", "transformer.layers.0.attention.q_proj.weight"],
    "an InternViT": ["embeddings.class_embedding", "encoder.layers.0.attn.qkv.weight", "encoder.layers.0.ls1"],
    "a ConvNeXt": ["stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.gamma"],
    "a SAM encoder": ["pos_embed", "blocks.0.attn.rel_pos_h", "blocks.0.attn.qkv.weight", "neck.0.weight"],
    "a MoonViT": ["patch_embed.pos_emb.weight", "encoder.blocks.0.wqkv.weight", "encoder.blocks.0.wo.weight"],
    "a Swin": ["encoder.layers.0.blocks.0.attention.self.relative_position_bias_table", "layernorm.weight"],
    "a ViT": ["embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"],
}
# transformers' Falcon, Mamba, Mixtral and DeepSeek-V2; Baichuan's and QWen's own.
LANGUAGE_MODELS = {
    "falcon": ["transformer.word_embeddings.weight", "transformer.h.0.self_attention.query_key_value.weight"],
    "mamba": ["backbone.embeddings.weight", "backbone.layers.0.mixer.A_log"],
    "mixtral": ["model.embed_tokens.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"],
    "deepseek_v2": ["model.embed_tokens.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
    "baichuan": ["model.embed_tokens.weight", "model.layers.0.self_attn.W_pack.weight"],
    "qwen": ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"],
}
NAMES = {
    "falcon": "a Falcon or a BLOOM", "mamba": "a Mamba", "mixtral": "a mixture of experts",
    "deepseek_v2": "a DeepSeek-V2", "baichuan": "a Baichuan", "qwen": "a Qwen of the first generation",
}  # fmt: skip


def replaced(file: Path, prefix: str, names: list[str]) -> None:
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(prefix)}
    file.unlink()
    save_file(kept | {prefix + name: torch.ones(2, 2) for name in names}, file, {"format": "pt"})


@pytest.mark.parametrize("what", TOWERS)
def test_a_tower_in_an_official_folder(models: Models, tmp_path: Path, what: str) -> None:
    """The id that its config names cannot be looked at; what lies in the folder says enough."""
    source = edit(models.copy("official", tmp_path / "source"), mm_vision_tower="someone/their-tower")
    (source / "conversion.json").unlink()
    replaced(source / "model.safetensors", TOWER, TOWERS[what])
    for to in ("hf", "gguf", "xtuner"):
        with pytest.raises(UnsupportedError, match=f"the vision tower is {what}") as refused:
            llava_convert.convert(source, to=to, out=tmp_path / "out")
        assert refused.value.exit_code == 4 and "clip, siglip" in str(refused.value.hint)
    assert "tensors" not in str(refused.value) and not (tmp_path / "out").exists()


def test_the_rest_of_it_converts(models: Models, tmp_path: Path) -> None:
    source = models.copy("official", tmp_path / "source")
    replaced(source / "model.safetensors", TOWER, TOWERS["an EVA"])
    llava_convert.convert(source, to="xtuner", out=tmp_path / "out", part="projector")
    assert (tmp_path / "out" / "projector" / "model.safetensors").is_file()


@pytest.mark.parametrize(("name", "what"), [("eva02_large", "an EVA"), ("sam_vit_l", "a SAM encoder")])
def test_a_frozen_tower_by_the_name_of_its_base(models: Models, tmp_path: Path, name: str, what: str) -> None:
    """Those of timm and of Meta's code, which are no folder and no id: before, a base that was not here (exit 3)."""
    source = edit(models.copy("official", tmp_path / "source"), mm_vision_tower=name, unfreeze_mm_vision_tower=False)
    (source / "conversion.json").unlink()
    replaced(source / "model.safetensors", TOWER, [])
    with pytest.raises(UnsupportedError, match=f"the base {name}: the vision tower is {what}"):
        llava_convert.convert(source, to="hf", out=tmp_path / "out")


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_by_its_model_type(models: Models, tmp_path: Path, kind: str) -> None:
    """In transformers' layout the config says it, whatever the tensors are called."""
    source = edit(models.copy("hf", tmp_path / "source"), text_config__model_type=kind)
    replaced(source / "model.safetensors", "language_model.", LANGUAGE_MODELS[kind])
    with pytest.raises(UnsupportedError, match=f"model_type '{kind}' is not a known language model family"):
        llava_convert.convert(source, to="official", out=tmp_path / "out")


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_in_a_pth(tmp_path: Path, kind: str) -> None:
    """It names no family, and its base is not here."""
    projector = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    state = {f"projector.model.{name}": torch.ones(shape) for name, shape in projector.items()}
    state |= {f"llm.{name}": torch.ones(2, 2) for name in LANGUAGE_MODELS[kind]}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "iter_1.pth")
    with pytest.raises(UnsupportedError, match=f"the language model is {NAMES[kind]}"):
        llava_convert.convert(tmp_path / "iter_1.pth", to="hf", out=tmp_path / "out")


def test_no_family_with_a_table_is_one() -> None:
    for table in architectures().values():
        names = [f"{table.part}.{row['name']}".replace("{layer}", "7") for row in table.rows]
        assert by_tensors(table.part, names) is None, table.name
    ids = [*towers(), "google/siglip2-so400m-patch14-384", "my-evaluation", "swift-clip", "eval/clip", "samples"]
    assert [name for name in ids if by_id(VISION, name) is not None] == []
    assert by_id(LLM, "facebook/dinov2-large") is None and by_id(VISION, "facebook/dinov2-large") == "a DINOv2"
    assert by_id(VISION, "BAAI/EVA-CLIP-8B") == "an EVA" and by_id(VISION, "OpenGVLab/InternViT-6B") == "an InternViT"


def test_rows_that_say_nothing(tmp_path: Path) -> None:
    assert len(unknown_families()) > 20
    for row in ('part = "ears"\nis = "x"\ntensors = ["a"]', 'part = "vision_tower"\ntensors = ["a"]'):
        with pytest.raises(TableError, match="lacks its part"):
            parse_unknown_families(f"[[family]]\n{row}", tmp_path)
